"""README.md of an exported folder: what it is, and the lines that load it."""

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
The model is a backbone with parts of the method around it, which `transformers` does not know: its Auto classes and
pipelines refuse this folder. cl-dist loads it:
```python
from cl_dist import load_exported

model, tokenizer, labels = load_exported("DIR")
logits = model(tokenizer(["a text"], padding=True, truncation=True, return_tensors="pt"))
```
`labels[k]` is class k of the logits: {labels}. `load_exported("DIR", TASK)` answers for {others}.

`backbone/` holds the backbone alone, with whatever of it was trained. It gives none of these answers.
"""

_TEXT = """\
The model writes its answers. `transformers` loads it, and so do servers of its family; a chat is one text:
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")
chat = [{{"role": "user", "content": "a text"}}]
asked = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
written = model.generate(**asked)[0, asked["input_ids"].shape[1] :]
answer = tokenizer.decode(written, skip_special_tokens=True).strip()
```
The chat template lays out text, question and `{ans}` as in training, to the token. A second user message is the row's
text_pair, and a system message another question than that of task `{task}`, which is asked without one:
{questions}

Written out, the prompt is {prompt}, without a start-of-text token. A row had at most
{length} tokens, answer included; the end of longer texts was cut off.

`generate` ends at `{eos}`, is greedy, and writes at most {longest} tokens, as `cl-dist predict` does. After `{gen}`
alone the model writes a sample of task `{task}`: set `do_sample=True`, `top_k` and a larger `max_new_tokens`.
"""

_MISSPELLED = """
With this tokenizer a chat is not always spelled as the parts of a row are: {wrong} of {of} rows that were compared
differ from training. Give the model the token numbers of `cl_dist.data.language.spell` where that matters.
"""


def class_card(method: str, task: str, tasks: Sequence[str], labels: Sequence[str], answered: Sequence[str]) -> str:
    """Return the README.md of a model that picks a class."""
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
    misspelled: tuple[int, int],
) -> str:
    """Return the README.md of a model that writes.

    Args:
        method: Its method.
        task: The task that it was exported for.
        tasks: All tasks in learned order.
        questions: What each answered task asks.
        prompt: An example of a prompt.
        tokens: Names of the answer mark, the end and the token that asks for a sample.
        lengths: Bounds of a row and of an answer in tokens.
        misspelled: (rows that the chat template lays out in other tokens than training, rows compared).
    """
    ans, eos, gen = tokens
    asked = "\n".join(f"- `{name}`: {json.dumps(question, ensure_ascii=False)}" for name, question in questions.items())
    text = _TEXT.format(
        ans=ans,
        eos=eos,
        gen=gen,
        task=task,
        questions=asked,
        prompt=f"`{json.dumps(prompt)}`",
        length=lengths[0],
        longest=lengths[1],
    )
    wrong, of = misspelled
    return _head("transformers", method, task, tasks) + text + (_MISSPELLED.format(wrong=wrong, of=of) if wrong else "")


def _head(library: str, method: str, task: str, tasks: Sequence[str]) -> str:
    return _HEAD.format(library=library, title=task, method=method, task=task, tasks=_listed(tasks))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
