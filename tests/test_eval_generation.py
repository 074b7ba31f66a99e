"""Generated answers: batching changes nothing, marking rules, and questions rendered as in training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import scaled
from tokenizers.processors import TemplateProcessing

from mftmerge import data
from mftmerge.errors import BadInput
from mftmerge.evaluate import generation
from mftmerge.evaluate.grid import grid
from mftmerge.evaluate.journal import Journal
from mftmerge.mask import Mask
from mftmerge.quickstart.tiny import random_checkpoint, tiny_tokenizer
from mftmerge.talk import Talk


def load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def greedy(model: Any, tokenizer: Any, prompt: list[int], new: int) -> list[int]:
    """Greedy decoding written out: the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return ids[len(prompt) :]


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("batch_tokens", [40, 100, 4000])
def test_batched_answers_equal_one_at_a_time(tiny: Callable[..., Path], architecture: str, batch_tokens: int) -> None:
    """Budgets that hold one row, that are passed while answers grow, and that hold all; a shared start and none."""
    model, tokenizer = load(tiny(architecture))
    model.train()
    model.generation_config.repetition_penalty = 3.0  # a model's own habits are switched off
    prompts = [list(range(10, 10 + n)) for n in (3, 17, 8, 5, 30)] + [[50, 51, 52], [60]]
    done: dict[int, list[int]] = {}
    options = {"max_new_tokens": 12, "batch_tokens": batch_tokens}
    found = generation.generate(model, tokenizer, prompts, done=done.__setitem__, **options)
    assert model.training
    assert [done[i] for i in range(len(prompts))] == found
    model.eval()
    expected = [greedy(model, tokenizer, p, 12) for p in prompts]
    assert [without_end(ids, tokenizer) for ids in found] == expected
    for drafts in (
        found,  # right ones
        [ids[:4] for ids in found],  # too short
        [[*ids[:2], 7, *ids[3:]] for ids in found],  # wrong in the middle
        [[] for _ in found],
        [[*ids, 5, 6] for ids in found],  # too long
        found[::-1],
    ):
        assert generation.generate(model, tokenizer, prompts, drafts=drafts, **options) == found
    assert len({tuple(ids) for ids in found}) > 1


@pytest.mark.parametrize("kind", ["Mistral", "Gemma2", "Gemma3Text"])
def test_a_shared_start_leaves_a_sliding_window_as_wide_as_it_is(kind: str, tmp_path: Path) -> None:
    """Rows of other lengths behind it: what pads the short ones takes up no place in the window."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **heads, sliding_window=16, initializer_range=0.25, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model, tokenizer = load(random_checkpoint(tmp_path / "m", config, tokenizer))
    numbers = random.Random(1)
    start, *rests = [[numbers.randrange(3, 250) for _ in range(n)] for n in (24, 2, 3, 8, 12, 15, 30)]
    prompts = [[*start, *rest] for rest in rests]
    expected = [greedy(model, tokenizer, p, 12) for p in prompts]
    found = generation.generate(model, tokenizer, prompts, max_new_tokens=12)
    assert [without_end(ids, tokenizer) for ids in found] == expected
    drafts = [[*ids[:3], 7] for ids in expected]
    assert generation.generate(model, tokenizer, prompts, max_new_tokens=12, drafts=drafts) == found


def test_a_right_draft_costs_one_pass_and_a_batch_shrinks(tiny: Callable[..., Path]) -> None:
    model, tokenizer = load(tiny("llama"))
    prompts = [list(range(10, 10 + n)) for n in (3, 17, 8, 5, 30)]
    passes = []
    model.register_forward_pre_hook(lambda _, args, given: passes.append(len(given["input_ids"])), with_kwargs=True)
    found = generation.generate(model, tokenizer, prompts, max_new_tokens=12)
    assert len(passes) > 10
    passes.clear()
    assert generation.generate(model, tokenizer, prompts, max_new_tokens=12, drafts=found) == found
    assert passes == [5]
    model.generation_config.eos_token_id = [ids[1] for ids in found[:3]]
    passes.clear()
    generation.generate(model, tokenizer, prompts, max_new_tokens=12)
    assert min(passes[2:]) < 5


def test_the_end_token_ends_an_answer(tiny: Callable[..., Path]) -> None:
    model, tokenizer = load(tiny("llama"))
    prompt = [5, 6, 7, 8]
    ids = greedy(model, tokenizer, prompt, 8)
    end = ids[2]
    model.generation_config.eos_token_id = [end]
    found = generation.generate(model, tokenizer, [prompt], max_new_tokens=8)
    assert found == [ids[: ids.index(end) + 1]] != [ids]
    with pytest.raises(BadInput, match="1024 positions"):
        generation.generate(model, tokenizer, [prompt], max_new_tokens=1022)


def test_answers_on_record_are_not_written_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, tokenizer = load(tiny("llama"))
    rows = [{"prompt": f"what is {i}", "completion": f"{i}"} for i in range(6)]
    path = tmp_path / "a.answers"
    whole = generation.Marker(rows, tokenizer, exact="text", max_new_tokens=6)(model)
    stop, seen = KeyboardInterrupt(), []

    class Stopping(Journal):
        def add(self, row: int, ids: list[int]) -> None:
            super().add(row, ids)
            seen.append(row)
            if len(seen) == 3:
                raise stop

    with pytest.raises(KeyboardInterrupt):
        generation.Marker(rows, tokenizer, exact="text", max_new_tokens=6)(model, Stopping(path, ["m"]))
    with path.open("a") as f:
        f.write('{"key": "cut o')
    journal = Journal(path, ["m"])
    assert sorted(journal.answers) == sorted(seen)
    marks = generation.Marker(rows, tokenizer, exact="text", max_new_tokens=6)(model, journal)
    assert marks.answers == whole.answers
    assert len(Journal(path, ["m"]).answers) == 6
    assert Journal(path, ["another mask"]).answers == {}


def test_questions_are_the_unlabelled_start_of_training_rows(tiny: Callable[..., Path]) -> None:
    _, tokenizer = load(tiny("llama"))
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]
    rows = [
        {"prompt": "two and two", "completion": "four"},
        {"messages": [*turns, {"role": "user", "content": "d"}, {"role": "assistant", "content": "e"}]},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    asked = generation.questions(rows, tokenizer)
    for question, tokens in zip(asked, data.tokenize(rows, tokenizer, 500), strict=True):
        n = len(question.prompt)
        assert question.prompt == tokens["input_ids"][:n]
        assert tokens["labels"][n] != -100  # the answer begins where the question ends
        assert tokens["labels"][n - 1] == -100
    assert [q.reference for q in asked] == ["four", "e", "c"]
    assert generation.questions(data.tokenize(rows, tokenizer, 500), tokenizer) == asked
    parts = [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]
    assert generation.questions([{"messages": parts}], tokenizer) == asked[2:]
    tokenizer.chat_template = "{{ tools[0].name }}{{ tone }}" + str(tokenizer.chat_template)
    more = {"tools": [{"name": "add"}], "chat_template_kwargs": {"tone": "brief"}}
    (with_tools,) = generation.questions([{"messages": turns, **more}], tokenizer)
    assert tokenizer.decode(with_tools.prompt).startswith("addbrief")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(BadInput, match="row 1: the chat template refuses it: no"):
        generation.questions(rows[:1], tokenizer)
    tokenizer.chat_template = None
    assert generation.questions(rows[:1], tokenizer)[0].prompt == tokenizer("two and two")["input_ids"]
    with pytest.raises(BadInput, match="row 1: a row of plain text"):
        generation.questions([{"text": "x"}], tokenizer)


def said(talk: Talk, prompt: str) -> str:
    return "".join(piece for _, piece in talk.answers(prompt))


def test_chat_answers_as_eval_does(tiny: Callable[..., Path]) -> None:
    """It ends at the tokenizer's end too, which the model's own settings do not name, and has none of their habits."""
    model, tokenizer = load(tiny("llama"))
    (question,) = generation.questions([{"prompt": "two and two", "completion": "4"}], tokenizer)
    (long,) = generation.generate(model, tokenizer, [question.prompt], max_new_tokens=12)
    tokenizer.eos_token_id = long[5]
    model.generation_config.repetition_penalty = 3.0
    (ids,) = generation.generate(model, tokenizer, [question.prompt], max_new_tokens=12)
    assert len(ids) < len(long)
    assert said(Talk(model, tokenizer, {}, max_new_tokens=12), "two and two") == tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_chat_ends_at_the_last_position_and_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    words = tiny_tokenizer()
    sizes = {"vocab_size": len(words), "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    model, tokenizer = load(random_checkpoint(tmp_path / "m", config, words))
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    talk = Talk(model, tokenizer, {}, max_new_tokens=60)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert said(talk, "hello")
    (question,) = generation.questions([{"prompt": "hello", "completion": "a"}], tokenizer)
    assert len(calls) == 48 - len(question.prompt)
    with pytest.raises(BadInput, match=r"the model's 48 positions; .*/new"):
        said(talk, "go on")
    talk.forget()
    with pytest.raises(BadInput, match="not UTF-8"):
        said(talk, "h\udce9llo")
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match="prompt is empty"):
        said(talk, "")
    assert said(talk, "hello")  # what was refused is not remembered


@pytest.mark.parametrize("begins", [False, True])
def test_a_row_without_a_question_is_refused_tokenised_too(begins: bool, tiny: Callable[..., Path]) -> None:
    """As training's validation has it; a token that the tokenizer begins every text with is no question."""
    _, tokenizer = load(tiny("llama"))
    if begins:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", 1)])
    text = data.tokenize([{"text": "hello"}], tokenizer, 50)
    assert text[0]["input_ids"][0] == (1 if begins else tokenizer("h", add_special_tokens=False)["input_ids"][0])
    with pytest.raises(BadInput, match="row 1: nothing stands before its answer"):
        generation.questions(text, tokenizer)
    tokenizer.chat_template = None
    asked = [{"prompt": "a", "completion": "b"}]
    assert generation.questions(data.tokenize(asked, tokenizer, 50), tokenizer) == generation.questions(
        asked, tokenizer
    )
    if not begins:  # else a model can begin there
        with pytest.raises(BadInput, match="row 2: nothing stands before"):
            generation.questions([*asked, {"prompt": "", "completion": "b"}], tokenizer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### $1,234.50", "1234.5"),
        ("#### -3.", "-3"),
        ("#### 1\n#### 70", "7E+1"),
        ("#### about 12 apples", "12"),
        ("the answer is 4", None),
        ("#### none", None),
    ],
)
def test_numbers_after_hashes(text: str, number: str | None) -> None:
    assert generation.number(text) == number


def test_other_rules() -> None:
    text = generation.rule("text")
    assert text("SELECT  a\n FROM b;") == text("select a from b")
    assert text("select a") != text("select b")
    last = generation.rule(r"re:answer is (\w+)")
    assert last("answer is A. No: answer is B.") == "B"
    assert last("none") is None
    assert generation.rule(r"re:[A-D]")("A or C") == "C"
    for wrong in ("numbers", "re:("):
        with pytest.raises(BadInput, match="exact match"):
            generation.rule(wrong)


def test_code_is_the_first_fenced_block() -> None:
    assert generation.code("Here:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1"
    assert generation.code("```py\nx = 1") == "x = 1"
    assert generation.code("x = 1") == "x = 1"


def marked(rows: list[dict[str, Any]], answers: list[str], tokenizer: Any, **options: Any) -> generation.Marks:
    """Marks of given answers: what the model writes is replaced, nothing else."""
    patch = pytest.MonkeyPatch()
    patch.setattr(generation.Marker, "answers", lambda *_, **__: answers)
    try:
        return generation.Marker(rows, tokenizer, **options)(None)
    finally:
        patch.undo()


def test_marking_of_exact_answers_and_programs(tiny: Callable[..., Path]) -> None:
    _, tokenizer = load(tiny("llama"))
    rows = [
        {"prompt": "f", "completion": "def f():\n    return 1\n#### 1", "tests": ["assert f() == 1", "assert f() < 2"]},
        {"prompt": "g", "completion": "#### 2"},
        {"prompt": "h", "completion": "def h(): return 3\n#### 3", "tests": "assert h() == 4"},
    ]
    answers = ["```python\ndef f():\n    return 1\n```\n#### 1", "#### 3", "def h(): return 4\n#### 3.0"]
    marks = marked(rows, answers, tokenizer, exact="number", run_tests=True)
    assert np.array_equal(marks.metrics["exact"], [[1, 1], [0, 1], [1, 1]])
    assert np.array_equal(marks.metrics["pass@1"], [[1, 1], [1, 1]])
    assert marks.answers == answers
    assert marks.remarks[0] == "own answers of the rows pass 1 of 2 tests"
    assert marks.remarks[1].startswith("tests run with ")


def test_rows_that_cannot_be_marked_are_named(tiny: Callable[..., Path]) -> None:
    _, tokenizer = load(tiny("llama"))
    rows = [{"prompt": "a", "completion": "#### 1"}, {"prompt": "b", "completion": "two"}]
    with pytest.raises(BadInput, match="row 2: the row's own answer"):
        generation.Marker(rows, tokenizer, exact="number")
    with pytest.raises(BadInput, match="no row carries"):
        generation.Marker(rows, tokenizer, run_tests=True)
    with pytest.raises(BadInput, match="row 1: tests must be"):
        generation.questions([rows[0] | {"tests": [1]}], tokenizer)


def test_answers_over_another_base_are_not_those_on_record(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model, tokenizer = load(tiny("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    mask = Mask.from_bools({name: np.zeros(model.get_parameter(name).shape, bool)})
    rows = [{"prompt": f"what is {i}", "completion": f"{i}"} for i in range(2)]
    tokens, path = data.tokenize(rows, tokenizer, 64), tmp_path / "a.answers"

    def keys(base: Path, **options: Any) -> set[str]:
        marker = generation.Marker(rows, tokenizer, exact="text", **{"max_new_tokens": 2} | options)
        grid(model, {"m": mask}, {"d": tokens}, scorers={"d": marker}, base=base, journal=path)
        return {json.loads(line)["key"] for line in path.read_text().splitlines()}

    base = scaled(tiny("llama"), tmp_path / "base", 2)
    assert len(keys(base)) == 2
    assert len(keys(base)) == 2
    assert len(keys(scaled(tiny("llama"), base, 3))) == 3, "of the model itself they are"
    rows[1]["prompt"] += " in words"  # tokenised rows may end before it
    assert len(keys(base)) == 5
