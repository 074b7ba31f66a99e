"""Conversations through published chat templates and through templates of every habit: what exactly is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl

from mftmerge import data
from mftmerge.errors import BadInput
from mftmerge.quickstart.tiny import tiny_tokenizer

# The templates of published models that TRL ships (those that it made for training apart).
PUBLISHED = {
    p.stem: p.read_text(encoding="utf-8")
    for p in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    if not p.stem.endswith("_training")
}
USER, ANSWER = {"role": "user", "content": "Qone"}, {"role": "assistant", "content": "Aone"}
SECOND = [{"role": "user", "content": "Qtwo"}, {"role": "assistant", "content": "Atwo"}]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "id": "abcdefghi", "function": {"name": "add", "arguments": {"a": 1}}}],
}
RESULT = {"role": "tool", "name": "add", "content": "2", "tool_call_id": "abcdefghi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": SCHEMA}}]
NO_CALLS = "does not show tool calls|must alternate|roles are supported"
WITHOUT_CALLS = (
    "cohere",
    "cohere2",
    "deepseek_r1_distill",
    "gemma",
    "gemma3",
    "idefics3",
    "lfm2",
    "llama3",
    "llava_next",
)
WITHOUT_CALLS += ("phi3", "phi3_5", "qwen2_5_vl", "smolvlm")


def learnt(template: str, row: dict[str, Any]) -> tuple[str, str]:
    """The whole text of a row, and what is learnt of it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    (tokens,) = data.tokenize(data.load_rows([row]), tokenizer, 8000)
    assert len(tokens["input_ids"]) == len(tokens["labels"])
    kept = [t for t in tokens["labels"] if t != data.IGNORE]
    return tokenizer.decode(tokens["input_ids"]), tokenizer.decode(kept)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates(name: str) -> None:
    """One turn, several, parts of text, a turn of weight 0: always the answers and their ends, never the questions."""
    template = PUBLISHED[name]
    one = learnt(template, {"messages": [USER, ANSWER]})[1]
    start, _, stop = one.partition("Aone")
    assert stop.strip(), "the end of the turn is learnt"
    assert "Q" not in one
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (USER, ANSWER)]
    assert learnt(template, {"messages": parts})[1] == one
    assert learnt(template, {"prompt": "Qone", "completion": "Aone"})[1] == one

    two = learnt(template, {"messages": [USER, ANSWER, *SECOND]})[1]
    first, _, last = two.partition("Aone")
    assert last.partition("Atwo")[2] == stop
    assert last.partition("Atwo")[0].strip(), "the first turn's end is learnt as well"
    assert "Q" not in two
    assert len(first) <= len(start)
    bad = {**ANSWER, "content": "Awrong", "weight": 0}
    skipped = learnt(template, {"messages": [USER, bad, *SECOND]})[1]
    assert skipped.partition("Atwo")[2] == stop
    assert "Awrong" not in skipped
    only_last = learnt(template, {"prompt": [USER, ANSWER, SECOND[0]], "completion": [SECOND[1]]})[1]
    assert "Aone" not in only_last
    assert only_last.partition("Atwo")[2] == stop


@pytest.mark.parametrize("name", PUBLISHED)
def test_tool_calls_of_published_templates(name: str) -> None:
    """A call is learnt, its result is not, and the tools reach the template; one that shows no calls is refused."""
    row = {"messages": [USER, CALL, RESULT, SECOND[1]], "tools": TOOLS}
    if name in WITHOUT_CALLS:
        with pytest.raises(BadInput, match=f"row 1: .*({NO_CALLS})"):
            learnt(PUBLISHED[name], row)
        return
    text, found = learnt(PUBLISHED[name], row)
    assert "add" in found
    assert "Atwo" in found
    assert "Qone" not in found
    assert "adds" in text or "tools" not in PUBLISHED[name], "the description of the tool"


LAST = "{% if m.role == 'assistant' and loop.last %}"
BASIC = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (BASIC + PROMPT, "Aone<end>Atwo<end>"),
        (BASIC, "<assistant>Aone<end><assistant>Atwo<end>"),  # no generation prompt: the role is learnt too
        # only the last turn has a block for reasoning
        (
            BASIC.replace(
                "{{ m.content", "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content"
            )
            + PROMPT,
            "Aone<end><think></think>Atwo<end>",
        ),
        # the generation prompt opens one
        (BASIC + PROMPT.replace("<assistant>", "<assistant><think>\n"), "Aone<end>Atwo<end>"),
        # a turn ends where the next role begins
        (BASIC.replace("<end>", "") + PROMPT, "Aone<user>Atwo<|im_end|>"),
        # the last turn ends otherwise
        (BASIC.replace("<end>", "{{ '<return>' if loop.last else '<end>' }}") + PROMPT, "Aone<end>Atwo<return>"),
        # the same with white space after it, which is nothing to learn
        (BASIC.replace("<end>", " \n\n") + PROMPT, "Aone Atwo<|im_end|>"),
        # a generation prompt is written in any case, after a turn's own end or after one like the user's
        (BASIC + "<assistant>", "Aone<end>Atwo<end>"),
        (
            BASIC.replace("<end>", "{{ '<stop>' if m.role == 'assistant' else '<end>' }}") + "<assistant>",
            "Aone<stop>Atwo<stop>",
        ),
        # no generation prompt, no roles
        ("{% for m in messages %}{{ m.content }}<end>{% endfor %}", "Aone<end>Atwo<end>"),
        # only whole conversations are taken
        (
            "{% if messages|length < 4 %}{{ raise_exception('too short') }}{% endif %}" + BASIC + PROMPT,
            "Aone<end>Atwo<end>",
        ),
        # contents are trimmed
        (BASIC.replace("m.content", "m.content | trim") + PROMPT, "Aone<end>Atwo<end>"),
    ],
)
def test_habits_of_templates(template: str, expected: str) -> None:
    row = {"messages": [USER, {**ANSWER, "content": "Aone"}, *SECOND]}
    assert learnt(template, row)[1] == expected


def test_template_arguments_reach_it() -> None:
    template = BASIC + "{% if quiet %}<quiet>{% endif %}" + PROMPT
    row = {"messages": [USER, ANSWER], "chat_template_kwargs": {"quiet": True}}
    assert learnt(template, row)[0].endswith("<quiet>")


def test_what_a_template_refuses_names_the_row() -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + BASIC
    )
    good, bad = {"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadInput, match="row 2: the chat template refuses it: System role not supported"):
        data.tokenize(data.load_rows([good, bad]), tokenizer, 512)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Qone"}, {"from": "gpt", "value": "Aone"}]},
        {"conversations": [{"role": "user", "content": "Qone"}, {"role": "assistant", "content": "Aone"}]},
        {"instruction": "Qone", "input": "", "output": "Aone"},
        {"prompt": "Qone", "chosen": "Aone", "rejected": "Bone"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "Bone"}]},
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "Bone"}]},
    ],
)
def test_rows_of_other_tools(row: dict[str, Any]) -> None:
    assert learnt(BASIC + PROMPT, row) == ("<user>Qone<end><assistant>Aone<end>", "Aone<end>")


def test_tools_and_template_arguments_as_json_text() -> None:
    """Tables hold them so, since their objects differ from row to row."""
    template = "{{ tools[0].function.name }}{{ tone }}" + BASIC + PROMPT
    row = {"messages": [USER, ANSWER], "tools": TOOLS, "chat_template_kwargs": {"tone": "brief"}}
    text = {k: json.dumps(v) if k != "messages" else v for k, v in row.items()}
    assert learnt(template, text) == learnt(template, row)
    assert learnt(template, row)[0].startswith("addbrief<user>")


def test_alpacas_input_and_system() -> None:
    row = {"instruction": "Sort.", "input": "3 1", "output": "1 3", "system": "Be brief."}
    text, found = learnt(BASIC + PROMPT, row)
    assert text == "<system>Be brief.<end><user>Sort.\n\n3 1<end><assistant>1 3<end>"
    assert found == "1 3<end>"


def test_an_answer_that_is_only_a_call() -> None:
    template = (
        BASIC.replace("<end>", "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function.name }}{% endif %}<end>") + PROMPT
    )
    for call in (CALL, {**CALL, "content": None}, {**CALL, "content": ""}):
        assert learnt(template, {"messages": [USER, call]})[1] == "CALL add<end>"
    with pytest.raises(BadInput, match="row 1: the chat template does not show tool calls"):
        learnt(BASIC, {"messages": [USER, CALL]})


def test_calls_and_their_results_in_one_turn() -> None:
    """As Gemma 4: what the tool says stands inside the assistant's turn, which goes on with the answer."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}<result>{{ m.content }}</result>{% else %}"
        "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<{{ m.role }}>{% endif %}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}{{ m.content }}"
        "{% if not m.tool_calls %}<end>{% endif %}{% endif %}{% endfor %}" + PROMPT
    )
    found = learnt(template, {"messages": [USER, CALL, RESULT, SECOND[1]]})[1]
    assert found == "<call>add</call><result>Atwo<end>"  # the token that opens the result says stop


def test_a_template_that_looks_into_an_empty_content() -> None:
    """As Command A: `content[0]` of a turn that is only a call."""
    template = BASIC.replace(
        "{{ m.content }}", "{{ m.content[0].text or m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    )
    assert "add" in learnt(template + PROMPT, {"messages": [USER, CALL]})[1]


def test_a_tokenizer_without_offsets_is_named() -> None:
    class Slow:
        eos_token_id, chat_template = 2, None

        def __call__(self, *_: object, **__: object) -> None:
            raise NotImplementedError("no offsets")

    with pytest.raises(BadInput, match=r"Slow cannot say where its tokens stand .*; use a fast tokenizer"):
        data.tokenize([{"text": "a"}], Slow(), 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "no speaker"),
        ({"messages": [{"role": "user"}, ANSWER]}, "message 1: content"),
        ({"messages": [USER, {**ANSWER, "content": 5}]}, "message 2: content"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no assistant text"),
    ],
)
def test_bad_conversations(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=rf"row 1: .*{message}"):
        data.load_rows([row])
