"""Rows and their tokens: what is learnt, what is refused, and by which name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mftmerge import data
from mftmerge.errors import BadInput
from mftmerge.quickstart.tiny import tiny_tokenizer

TALK = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two."},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def learnt(tokenizer: Any, tokens: data.Tokens) -> str:
    return tokenizer.decode([t for t in tokens["labels"] if t != data.IGNORE])


def test_loss_is_on_the_assistants_turns_only(tokenizer: Any) -> None:
    (tokens,) = data.tokenize([{"messages": TALK}], tokenizer, 512)
    assert learnt(tokenizer, tokens) == "two.<|im_end|>four.<|im_end|>"
    assert tokenizer.decode(tokens["input_ids"]) == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert len(tokens["input_ids"]) == len(tokens["labels"])


def test_offsets_agree_with_the_templates_own_marks(tokenizer: Any) -> None:
    marked = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    (tokens,) = data.tokenize([{"messages": TALK}], tokenizer, 512)
    assert [int(t != data.IGNORE) for t in tokens["labels"]] == list(marked["assistant_masks"])


def test_prompt_and_completion_become_turns_or_plain_text(tokenizer: Any) -> None:
    (chat,) = data.tokenize([{"prompt": "one?", "completion": "two."}], tokenizer, 512)
    (same,) = data.tokenize([{"messages": TALK[:2]}], tokenizer, 512)
    assert chat == same
    (listed,) = data.tokenize([{"prompt": TALK[:3], "completion": TALK[3:]}], tokenizer, 512)
    assert learnt(tokenizer, listed) == "four.<|im_end|>"
    plain = tiny_tokenizer()
    plain.chat_template = None
    (joined,) = data.tokenize([{"prompt": "one? ", "completion": "two."}], plain, 512)
    assert learnt(plain, joined) == "two.<|im_end|>"
    (text,) = data.tokenize([{"text": "all of it"}], plain, 512)
    assert learnt(plain, text) == "all of it<|im_end|>"


Q, A = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}
SYSTEM = {"role": "system", "content": "Be brief."}
TRANSCRIPT = "\n\nHuman: zero?\n\nAssistant: zero.\n\nHuman: one?\n\nAssistant:"
PUBLISHED: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    # rows as they are published -> the turns before the answer "two.", which alone is learnt
    "tatsu-lab/alpaca": ({"instruction": "one?", "input": "", "output": "two.", "text": "### one? ### two."}, [Q]),
    "yahma/alpaca-cleaned": ({"instruction": "one?", "input": "", "output": "two."}, [Q]),
    "alpaca with a prompt that holds all": ({"instruction": "one?", "output": "two.", "prompt": "one? two."}, [Q]),
    "alpaca with turns": (
        {"instruction": "one?", "output": "two.", "history": [["zero?", "zero."]], "system": "Be brief."},
        [SYSTEM, {"role": "user", "content": "zero?"}, {"role": "assistant", "content": "zero."}, Q],
    ),
    "code_alpaca": ({"instruction": "one", "input": "more?", "output": "two."}, [{**Q, "content": "one\n\nmore?"}]),
    "databricks-dolly-15k": (
        {"instruction": "one?", "context": "This.", "response": "two.", "category": "open_qa"},
        [{**Q, "content": "one?\n\nThis."}],
    ),
    "gsm8k": ({"question": "one?", "answer": "two."}, [Q]),
    "sql-create-context": (
        {"question": "one?", "context": "CREATE", "answer": "two."},
        [{**Q, "content": "one?\n\nCREATE"}],
    ),
    "MetaMathQA": ({"query": "one?", "response": "two.", "original_question": "one", "type": "x"}, [Q]),
    "MATH": ({"problem": "one?", "solution": "two.", "answer": "2", "level": "1"}, [Q]),
    "OpenOrca": ({"id": "1", "system_prompt": "Be brief.", "question": "one?", "response": "two."}, [SYSTEM, Q]),
    "HelpSteer2": ({"prompt": "one?", "response": "two.", "helpfulness": 4}, [Q]),
    "Tulu": ({"messages": [Q, A], "source": "x"}, [Q]),
    "ultrachat_200k": ({"prompt": "one?", "prompt_id": "1", "messages": [Q, A]}, [Q]),
    "OpenHermes-2.5": (
        {
            "conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two."}],
            "system_prompt": None,
        },
        [Q],
    ),
    "OpenThoughts": (
        {
            "system": "Be brief.",
            "conversations": [{"from": "user", "value": "one?"}, {"from": "assistant", "value": "two."}],
        },
        [SYSTEM, Q],
    ),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "human", "value": "zero?", "weight": None},
                {"from": "gpt", "value": "zero.", "weight": 0.0},
                {"from": "human", "value": "one?", "weight": None},
                {"from": "gpt", "value": "two.", "weight": 1.0},
            ]
        },
        [{"role": "user", "content": "zero?"}, {"role": "assistant", "content": "zero."}, Q],
    ),
    "WildChat": ({"conversation": [Q, A], "model": "x"}, [Q]),
    "conversations beside their text": (
        {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two."}], "text": "one? two."},
        [Q],
    ),
    "hh-rlhf": (
        {"chosen": TRANSCRIPT + " two.", "rejected": TRANSCRIPT + " three."},
        [{"role": "user", "content": "zero?"}, {"role": "assistant", "content": "zero."}, Q],
    ),
    "hh-rlhf with prompts": (
        {"prompt": "\n\nHuman: one?\n\nAssistant:", "chosen": "\n\nHuman: one?\n\nAssistant: two."},
        [Q],
    ),
    "ultrafeedback_binarized": ({"prompt": "one?", "chosen": [Q, A], "rejected": [Q, A]}, [Q]),
    "argilla/dpo-mix-7k": ({"dataset": "x", "chosen": [Q, A], "rejected": [Q, A]}, [Q]),
    "prompt and chosen as lists, both whole": ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, A]}, [Q]),
    "the system's turn in the prompt alone": ({"prompt": [SYSTEM, Q], "chosen": [Q, A]}, [SYSTEM, Q]),
    "the system's turn in the chosen alone": ({"prompt": [Q], "chosen": [SYSTEM, Q, A]}, [SYSTEM, Q]),
    "prompt as text, chosen the answer as a turn": ({"prompt": "one?", "chosen": [A], "rejected": [A]}, [Q]),
    "prompt as turns, chosen as text": ({"prompt": [Q], "chosen": "two.", "rejected": "three."}, [Q]),
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": "one?", "chosen": "two.", "rejected": "three."},
        [SYSTEM, Q],
    ),
    "distilabel-intel-orca": ({"system": "", "input": "one?", "chosen": "two.", "rejected": "three."}, [Q]),
    "LLaMA-Factory's preferences": (
        {"conversations": [{"from": "human", "value": "one?"}], "chosen": {"from": "gpt", "value": "two."}},
        [Q],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_published_rows_the_answer_alone_is_learnt(tokenizer: Any, name: str) -> None:
    row, before = PUBLISHED[name]
    (tokens,) = data.tokenize(data.load_rows([row]), tokenizer, 512)
    assert tokenizer.decode(tokens["input_ids"]) == tokenizer.apply_chat_template([*before, A], tokenize=False)
    assert learnt(tokenizer, tokens) == "two.<|im_end|>"


def test_columns_decide_where_a_row_can_be_read_in_several_ways(tokenizer: Any) -> None:
    alpaca = {"instruction": "one?", "output": "two.", "text": "one? two."}
    row = {"messages": [Q, A], "question": "one", "answer": "2", "prompt": "p", "text": "t"}
    for given, columns, expected in (
        (alpaca, {"text": "text"}, {"text": "one? two."}),
        (row, {"prompt": "question", "completion": "answer"}, {"prompt": "one", "completion": "2"}),
        (row, {"completion": "text"}, {"prompt": "p", "completion": "t"}),
        ({"text": "t", "dialog": [Q, A]}, {"messages": "dialog"}, {"messages": [Q, A]}),
        ({"prompt": "x", "chosen": [Q, A]}, {"messages": "chosen"}, {"messages": [Q, A]}),
    ):
        (found,) = data.load_rows([given], columns=columns)
        assert {k: found[k] for k in ("messages", "prompt", "completion", "text") if k in found} == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Write.", "text": "It."}, "text and prompt; .*columns prompt=prompt columns completion=text"),
        ({"text": "Write f.", "code": "def f"}, "has text and code; .*columns prompt=text columns completion=code"),
        ({"text": "A bill.", "summary": "B."}, "has text and summary; columns text=text learns all"),
        ({"message_id": "1", "text": "one?", "role": "prompter"}, "text with a role is one message of a conversation"),
        ({"chosen": "two.", "rejected": "three."}, "no question before it; .*columns prompt=NAME"),
        ({"chosen": [A]}, "no question before it; .*columns messages=chosen"),
        ({"prompt": "other", "chosen": [Q, A]}, "does not begin with the question beside it"),
        ({"prompt": [SYSTEM, {**Q, "content": "other"}], "chosen": [Q, A]}, "does not begin with the question"),
        ({"chosen": "\n\nHuman: one?\n\nAssistant: two.\n\nHuman: three?"}, "does not end with the assistant"),
        (
            {"question": "one?", "context": "x", "answers": {"text": ["two."]}},
            r"this one has \['answers', 'context', 'question'\]",
        ),
        ({"question": "one?", "choices": ["a", "b"], "answer": "a"}, "choices would not be read"),
        ({"instruction": "one?", "output": "two.", "history": "zero"}, "history must be a list of pairs"),
        ({"prompt": "one?", "completion": "two.", "label": False}, "label is false"),
    ],
)
def test_rows_that_can_be_read_in_two_ways_are_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=rf"row 1: .*{message}"):
        data.load_rows([row])


def test_a_template_that_rewrites_history_uses_its_marks_or_says_so() -> None:
    tokenizer = tiny_tokenizer()
    rewriting = tokenizer.chat_template.replace(
        "message['content'] +", "('' if not loop.last else message['content']) +"
    )
    tokenizer.chat_template = rewriting
    (tokens,) = data.tokenize([{"messages": TALK}], tokenizer, 512)
    assert learnt(tokenizer, tokens) == "<|im_end|>four.<|im_end|>"
    tokenizer.chat_template = rewriting.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(BadInput, match=r"row 1: .*rewrites earlier turns"):
        data.tokenize([{"messages": TALK}], tokenizer, 512)


def test_rows_with_nothing_left_to_learn_are_left_out(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "x" * 100, "completion": "y"}, {"prompt": "x", "completion": "y"}]
    with caplog.at_level("WARNING"):
        assert len(data.tokenize(rows, tokenizer, 60)) == 1
    assert "1 of 2 rows left out" in caplog.text
    with pytest.raises(BadInput, match="max length 10"):
        data.tokenize(rows, tokenizer, 10)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "must be an object"),
        ('{"question": "a"}', "needs messages"),
        ('{"prompt": "a", "completion": " "}', "no assistant text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant text"),
        ('{"messages": "a"}', "list of objects"),
        ('{"prompt": "a", "completion": []}', "both"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(BadInput, match=rf"rows.jsonl:3: .*{message}"):
        data.load_rows(path)


def test_files_of_each_kind_and_mixtures(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert data.load_rows(tmp_path / name) == rows
    assert data.load_rows([tmp_path / "a.json", tmp_path / "a.jsonl"]) == rows + rows
    others = [{"text": f"other {i}"} for i in range(50)]
    mixed = data.mix([rows, others], [1, 1], seed=0)
    assert {r["text"] for r in mixed} == {r["text"] for r in rows + others}
    assert 0.35 < sum(r in rows for r in mixed) / len(mixed) < 0.65
    assert mixed == data.mix([rows, others], [1, 1], seed=0)
    with pytest.raises(BadInput, match="2 positive weights"):
        data.mix([rows, others], [1], seed=0)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.jsonl: no such file"):
        data.load_rows(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(BadInput, match=r"empty\.jsonl: no rows"):
        data.load_rows(tmp_path / "empty.jsonl")
    with pytest.raises(BadInput, match="no-such-owner/no-such-set: neither a file"):
        data.load_rows("no-such-owner/no-such-set")


def test_a_rows_digest_is_what_it_says_in_any_shape() -> None:
    def call(name: str) -> dict[str, Any]:
        return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": {}}}]}

    def digest(*turns: dict[str, Any]) -> str:
        (row,) = data.load_rows([{"messages": [Q, *turns]}])
        return data.row_digest(row)

    assert digest(A) == data.row_digest({"prompt": "one?", "completion": " two."})
    assert digest(A) == digest({**A, "content": [{"type": "text", "text": "two."}]})
    assert digest(call("f")) == digest({**call("f"), "content": None}) == digest({**call("f"), "content": ""})
    assert len({digest(A), digest(call("f")), digest(call("g")), digest(call("f"), A)}) == 4
    data.require_disjoint({"train": [{"messages": [Q, call("f")]}], "validation": [{"messages": [Q, call("g")]}]})
    (row,) = data.load_rows([{"prompt": None, "text": "all of it"}])  # as in JSON lines of several shapes
    assert data.row_digest(row) == data.row_digest({"text": "all of it"})


def test_digest_follows_the_tokens(tokenizer: Any) -> None:
    one, two = (data.tokenize([{"text": t}], tokenizer, 64) for t in ("a b", "a c"))
    assert data.digest(one) == data.digest(list(one)) != data.digest(two)


def test_what_the_model_cannot_read_is_known_before_it_runs(tiny: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    from mftmerge.train.run import train_mask

    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    model.config.n_positions = 16
    notes: list[str] = []
    common: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "steps": 1, "batch_size": 2, "eval_share": 0}
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (8, 30)]
    train_mask(model, rows, note=notes.append, **common)
    assert notes[0] == "1 of 2 rows are cut: the model has 16 positions"
    late = [{"input_ids": [5] * 40, "labels": [data.IGNORE] * 39 + [5]}]
    with pytest.raises(BadInput, match="no row has an assistant token within the model's 16 positions"):
        train_mask(model, late, **common)
    rows[1]["input_ids"][3] = 512
    with pytest.raises(BadInput, match="row 2: token number 512 is not in the model, whose embeddings have"):
        train_mask(model, rows, **common)


def test_models_in_wrappers(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Compiled and data parallel: what is inside. With adapters or quantised: refused before anything runs."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from mftmerge.train.run import train_mask

    common: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "steps": 1, "batch_size": 2, "eval_share": 0}
    rows = [{"prompt": f"{i}", "completion": f"{i + 1}"} for i in range(4)]

    def plain() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny("llama"))

    expected = train_mask(plain(), rows, **common).mask.digest
    for wrapped in (torch.compile(plain()), torch.nn.DataParallel(plain())):
        assert train_mask(wrapped, rows, **common).mask.digest == expected
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted, quantised = plain(), plain()
    adapted.add_adapter(lora)
    quantised.is_quantized = True
    for model, message in (
        (peft.get_peft_model(plain(), lora), "merge them first"),
        (adapted, "merge them first"),
        (quantised, "the model is quantised"),
    ):
        with pytest.raises(BadInput, match=message):
            train_mask(model, rows, **common)
    peft.get_peft_model(plain(), lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(BadInput, match=r"an adapter .*merge it into its base first"):
        train_mask(tmp_path / "adapter", rows, **common)


def test_rows_in_memory_are_written_down_in_words(tiny: Callable[..., Path], tmp_path: Path) -> None:
    import pandas as pd
    import yaml
    from datasets import Dataset, DatasetDict

    from mftmerge.train.run import train_mask

    rows = [{"prompt": f"{i}", "completion": f"{i + 1}"} for i in range(4)]
    dataset = Dataset.from_list(rows)
    kinds = {"list": rows, "IterableDataset": dataset.to_iterable_dataset(), "DataFrame": pd.DataFrame(rows)}
    kinds |= {"DatasetDict": DatasetDict(train=dataset), "generator": (row for row in rows)}
    for kind, given in kinds.items():
        out = tmp_path / f"{kind}.mask"
        train_mask(tiny("llama"), given, out, steps=0, eval_share=0)
        assert yaml.safe_load(Path(f"{out}.yaml").read_text())["data"] == f"rows of a {kind} in memory"
