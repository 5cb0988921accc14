"""README.md of an exported folder, with code to load the model."""

import json
from collections.abc import Sequence

_HEAD = """\
---
library_name: {library}
tags: [continual-learning, cl-dist]
---
# {title}
Trained with cl-dist, method `{method}`, exported for task `{task}`. Tasks in learned order: {tasks}.

"""

_CLASSES = """\
The model is a backbone with modules of the method, which `transformers` does not support: its Auto classes and
pipelines refuse this folder. Load it with cl-dist:
```python
from cl_dist import load_exported

model, tokenizer, labels = load_exported("DIR")
logits = model(tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt"))
```
`labels[k]` is class k of the logits: {labels}. `load_exported("DIR", TASK)` loads the model for {others}.

`backbone/` is the backbone alone, with its trained weights. It does not classify.
"""

_TEXT = """\
The model generates its answers. `transformers` and inference servers load it; a chat is one text:
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")
chat = [{{"role": "user", "content": "a text"}}]
inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
```
The chat template renders text, question and `{ans}` with the same tokens as in training. A second user message is the
row's text_pair, and a system message is the question; the default is that of task `{task}`:
{questions}

The rendered prompt is {prompt}, without a start-of-text token. A row had at most
{length} tokens, including the answer; longer texts were truncated at the end.

`generate` ends at `{eos}`, is greedy, and generates at most {longest} tokens, as `cl-dist predict` does. After `{gen}`
alone the model generates a sample of task `{task}`: set `do_sample=True`, `top_k` and a larger `max_new_tokens`.
"""

_MISMATCHES = """
With this tokenizer a chat does not always have the tokens of training: {wrong} of {of} compared rows differ. Where that
matters, use the token ids of `cl_dist.data.language.encode_row`.
"""


def class_card(method: str, task: str, tasks: Sequence[str], labels: Sequence[str], answered: Sequence[str]) -> str:
    """Return the README.md of a classifier."""
    others = [name for name in answered if name != task]
    shown = ", ".join(f"`{name}`" for name in others) if others else "no other task"
    return _head("cl-dist", method, task, tasks) + _CLASSES.format(labels=_listed(labels), others=shown)


def text_card(
    method: str,
    task: str,
    tasks: Sequence[str],
    questions: dict[str, str],
    prompt: str,
    tokens: tuple[str, str, str],
    lengths: tuple[int, int],
    mismatches: tuple[int, int],
) -> str:
    """Return the README.md of a language model.

    Args:
        method: Its method.
        task: The exported task.
        tasks: All tasks in learned order.
        questions: The question of each learned task.
        prompt: An example of a prompt.
        tokens: Names of the answer mark, the end token and the token that starts a sample.
        lengths: Maximum lengths of a row and of an answer in tokens.
        mismatches: (rows whose chat differs from training in its tokens, rows compared).
    """
    ans, eos, gen = tokens
    listed = "\n".join(
        f"- `{name}`: {json.dumps(question, ensure_ascii=False)}" for name, question in questions.items()
    )
    text = _TEXT.format(
        ans=ans,
        eos=eos,
        gen=gen,
        task=task,
        questions=listed,
        prompt=f"`{json.dumps(prompt)}`",
        length=lengths[0],
        longest=lengths[1],
    )
    wrong, of = mismatches
    return _head("transformers", method, task, tasks) + text + (_MISMATCHES.format(wrong=wrong, of=of) if wrong else "")


def _head(library: str, method: str, task: str, tasks: Sequence[str]) -> str:
    return _HEAD.format(library=library, title=task, method=method, task=task, tasks=_listed(tasks))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
