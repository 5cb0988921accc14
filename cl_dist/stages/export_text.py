"""Tokenizer, chat template and generation settings of an exported language model, with the prompt format of training.

Training encodes context, question and answer separately, with a leading space if the vocabulary's words have one, and
concatenates the tokens: `C Q ans A eos` (see data.language). Servers render a chat template to one text and encode it.
The exported tokenizer adds no tokens, and its template places spaces such that the tokens match, which is checked on
rows of the tasks.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cl_dist.data.language import SpecialTokens, TextCodec, full_question
from cl_dist.data.rows import Row
from cl_dist.errors import ConfigError

TEMPLATE = """\
{#- The prompt format of training. user: the text, and in a second message its text_pair; system: the question, if it
    is not that of the exported task; assistant: the answer. Without a system message, the question is not repeated
    after a text that ends in it. -#}
{%- set found = namespace(question=none, users=[], answer=none) -%}
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else message.content | map(attribute='text') | join -%}
  {%- if message.role == 'system' and not found.users -%}
    {%- set found.question = content -%}
  {%- elif message.role == 'user' and found.users | length < 2 and found.answer is none -%}
    {%- set found.users = found.users + [content] -%}
  {%- elif message.role == 'assistant' and found.users and found.answer is none -%}
    {%- set found.answer = content | trim -%}
  {%- else -%}
    {{- raise_exception('this model answers one question about one text: expected at most one system message (the '
                        'question), one user message (the text) or two (text, text_pair), then at most one answer') -}}
  {%- endif -%}
{%- endfor -%}
{%- set text = (found.users | first | default('')) | trim -%}
{%- set pair = found.users[1] if found.users | length > 1 else '' -%}
{%- set question = QUESTION if found.question is none else found.question -%}
{%- if found.question is none and not pair and question and text.endswith(' ' ~ question) -%}
  {%- set text = text[: text | length - question | length] | trim -%}
{%- endif -%}
{%- set asked = (pair ~ ' ' ~ question if pair and question else pair or question) | trim -%}
{{- LEAD ~ text if text else '' -}}
{{- ((BETWEEN if text else LEAD) ~ asked) if asked else '' -}}
{{- ANS -}}
{%- if found.answer is not none -%}
  {{- (ANSWER_LEAD ~ found.answer if found.answer else '') ~ EOS -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Example:
    """A row, and the question of its task."""

    row: Row
    question: str

    def messages(self) -> list[dict[str, str]]:
        """Return the row as a chat, with its answer."""
        users = [self.row.text, *([self.row.text_pair] if self.row.text_pair else [])]
        return [
            {"role": "system", "content": self.question},
            *({"role": "user", "content": text} for text in users),
            {"role": "assistant", "content": self.row.label},
        ]

    def tokens(self, codec: TextCodec) -> list[int]:
        """Return the tokens of the row in training, without truncation."""
        context, asked = codec.encode(self.row.text), codec.encode(full_question(self.row, self.question))
        return [*context, *asked, codec.special.ans, *codec.encode(self.row.label), codec.special.eos]


def text_tokenizer(
    source: PreTrainedTokenizerBase, num_tasks: int, spare: int, question: str, examples: Sequence[Example]
) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the special tokens of a language model, and a chat template in its training format.

    Args:
        source: The tokenizer of training.
        num_tasks: Number of tasks with a token.
        spare: See SpecialTokens.size.
        question: Question for chats without a system message.
        examples: Rows on which the template is compared with training.

    Raises:
        ConfigError: If the special tokens cannot be added with their ids.
    """
    codec = TextCodec(source)
    special = codec.special
    made = _with_tokens(source, special, _free_names(source, special.names(num_tasks, spare)))
    ans, eos = (str(made.convert_ids_to_tokens(number)) for number in (special.ans, special.eos))
    expected = [example.tokens(codec) for example in examples]
    best = -1
    for between in (" ", ""):
        for answer_lead in dict.fromkeys((codec.lead, "", " ")):
            names = {"LEAD": codec.lead, "BETWEEN": between, "ANSWER_LEAD": answer_lead, "ANS": ans, "EOS": eos}
            template = _filled(TEMPLATE, {"QUESTION": question.strip(), **names})
            right = sum(
                made.apply_chat_template(example.messages(), chat_template=template, return_dict=False) == tokens
                for example, tokens in zip(examples, expected, strict=True)
            )
            if right > best:
                best, made.chat_template = right, template
            if right == len(examples):
                return made
    return made


def count_mismatches(tokenizer: Any, codec: TextCodec, examples: Iterable[Example]) -> int:
    """Return the number of rows for which the tokens of the chat template differ from training."""
    return sum(
        tokenizer.apply_chat_template(example.messages(), return_dict=False) != example.tokens(codec)
        for example in examples
    )


def generation(special: SpecialTokens, longest: int) -> GenerationConfig:
    """Return the generation settings of a run: greedy, up to one token more than the longest answer."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=special.eos, pad_token_id=special.pad, do_sample=False, max_new_tokens=longest + 1
    )


def _filled(template: str, values: dict[str, str]) -> str:
    """Replace names in capitals by their values as literals, whose syntax JSON and Jinja share."""
    names = rf"\b({'|'.join(values)})\b"
    return re.sub(names, lambda name: json.dumps(values[name[0]], ensure_ascii=False), template)


def _free_names(source: PreTrainedTokenizerBase, names: Sequence[str]) -> list[str]:
    """Return names for special tokens, with marks added to those that the vocabulary already has."""
    known, free = source.get_vocab(), []
    for name in names:
        while name in known:
            name = f"{name[:-1]}*>"
        free.append(name)
    return free


def _with_tokens(source: PreTrainedTokenizerBase, special: SpecialTokens, names: list[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has the special tokens, uses them for padding and end, and adds no tokens.

    It is always a PreTrainedTokenizerFast built from tokenizer.json: other classes may add a start-of-text token when
    they are loaded.
    """
    if not isinstance(source, PreTrainedTokenizerFast):
        raise ConfigError(f"{type(source).__name__}: expected a tokenizer with a tokenizer.json, which can be exported")
    inner = Tokenizer.from_str(_without_gaps(source.backend_tokenizer.to_str(), special.base))
    inner.no_padding()
    inner.no_truncation()
    inner.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    inner.add_special_tokens(names)
    ids = [inner.token_to_id(name) for name in names]
    if ids != list(range(special.base, special.base + len(names))):
        raise ConfigError(f"the tokenizer's ids have gaps, which its kind of vocabulary cannot fill: {ids[:4]}")
    named = {name: token for name, token in source.special_tokens_map.items() if isinstance(token, str)}
    fast: Any = PreTrainedTokenizerFast  # its constructor carries no types
    made: PreTrainedTokenizerBase = fast(
        tokenizer_object=inner,
        **named | {"eos_token": inner.id_to_token(special.eos), "pad_token": inner.id_to_token(special.pad)},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=source.model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # a decoder would read token types as tokens
    )
    return made


def _without_gaps(serialized: str, base: int) -> str:
    """Return a tokenizer.json with a token for each id below base, since added tokens get the next ids."""
    tree = json.loads(serialized)
    vocabulary = tree["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        return serialized
    taken = {*vocabulary.values(), *(token["id"] for token in tree.get("added_tokens", []))}
    gaps = [number for number in range(base) if number not in taken]
    if not gaps:
        return serialized
    vocabulary |= {f"<unused-{number}>": number for number in gaps}
    return json.dumps(tree, ensure_ascii=False)
