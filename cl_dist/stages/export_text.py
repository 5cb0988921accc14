"""The tokenizer and settings of an exported model that writes, so that plain transformers asks it as it was trained.

Training encodes context, question and answer apart, with a space in front where the vocabulary has words with it, and
joins the numbers: `C Q ans A eos` (see data.language). Servers render a chat template to one text and encode that. The
exported tokenizer adds nothing of its own, and its template puts those spaces where the numbers come out the same,
which is measured on rows of the tasks.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors
from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cl_dist.data.language import SpecialTokens, TextCodec, asked_of
from cl_dist.data.rows import Row
from cl_dist.errors import ConfigError

TEMPLATE = """\
{#- The layout that the model was trained on. user: the text, and in a second message its text_pair; system: the
    question, where it is not that of the exported task; assistant: the answer. Without a system message a text that
    ends in the question is not asked it again. -#}
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
        """Return the numbers of the row in training, where nothing of it is cut."""
        context, asked = codec.encode(self.row.text), codec.encode(asked_of(self.row, self.question))
        return [*context, *asked, codec.special.ans, *codec.encode(self.row.label), codec.special.eos]


def text_tokenizer(
    source: PreTrainedTokenizerBase, num_tasks: int, spare: int, question: str, examples: Sequence[Example]
) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the special tokens of a model that writes, and a chat template of its training layout.

    Args:
        source: The tokenizer that the model was trained with.
        num_tasks: Tasks that the model has tokens for.
        spare: See Special.size.
        question: What is asked where a chat does not say it.
        examples: Rows on which the layout is compared with that of training.

    Raises:
        ConfigError: If the vocabulary cannot take the special tokens at their numbers.
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
    """Return how many rows the chat template lays out in other numbers than training did."""
    return sum(
        tokenizer.apply_chat_template(example.messages(), return_dict=False) != example.tokens(codec)
        for example in examples
    )


def generation(special: SpecialTokens, longest: int) -> GenerationConfig:
    """Return how the model is asked to write, as in a run: greedily, to its end, one token more than any answer had."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=special.eos, pad_token_id=special.pad, do_sample=False, max_new_tokens=longest + 1
    )


def _filled(template: str, values: dict[str, str]) -> str:
    """Replace names in capitals by their values as literals, which JSON and Jinja write alike."""
    names = rf"\b({'|'.join(values)})\b"
    return re.sub(names, lambda name: json.dumps(values[name[0]], ensure_ascii=False), template)


def _free_names(source: PreTrainedTokenizerBase, names: Sequence[str]) -> list[str]:
    """Return the names of special tokens, those that the vocabulary has already with marks added."""
    known, free = source.get_vocab(), []
    for name in names:
        while name in known:
            name = f"{name[:-1]}*>"
        free.append(name)
    return free


def _with_tokens(source: PreTrainedTokenizerBase, special: SpecialTokens, names: list[str]) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has the special tokens, pads and ends with them, and adds none by itself.

    Whatever class the source has, this one is built from tokenizer.json alone: classes that build their own parts on
    loading would add a start of text again.
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
        raise ConfigError(f"the tokenizer's ids have gaps, and its kind of vocabulary cannot fill them: {ids[:4]}")
    named = {name: token for name, token in source.special_tokens_map.items() if isinstance(token, str)}
    fast: Any = PreTrainedTokenizerFast  # its constructor carries no types
    made: PreTrainedTokenizerBase = fast(
        tokenizer_object=inner,
        **named | {"eos_token": inner.id_to_token(special.eos), "pad_token": inner.id_to_token(special.pad)},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=source.model_max_length,
        model_input_names=["input_ids", "attention_mask"],  # others, as token types, a decoder would read as tokens
    )
    return made


def _without_gaps(serialized: str, base: int) -> str:
    """Return a tokenizer.json whose vocabulary has a token for each number below base: others are added behind it."""
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
