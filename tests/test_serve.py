"""`mftmerge serve` through the real openai client: every answer that of its own mask, whatever happens beside it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import random_mask
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftmerge.live import attach
from mftmerge.mask import Mask
from mftmerge.serve.settings import ServeSettings

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")

from mftmerge.serve.engine import Job  # noqa: E402
from mftmerge.serve.sampling import Chosen, Sampling, choose  # noqa: E402
from mftmerge.serve.service import Service  # noqa: E402

ROOT = Path(__file__).parent.parent
KEY = "secret"
PROMPTS = ["hello", "what is 7 + 5?", "def f(x):", "one two three four", "Zebra", "a " * 30]
NO_END = {"2": -100}  # the token that ends an answer never comes


@dataclass
class Running:
    """A server, and where to reach it."""

    process: subprocess.Popen[str]
    url: str

    def client(self, kind: str = "OpenAI", **options: Any) -> Any:
        return getattr(openai, kind)(base_url=self.url, api_key=KEY, max_retries=0, timeout=120, **options)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url.removesuffix("/v1") + "/health") as reply:
            found: dict[str, Any] = json.load(reply)
        return found

    def send(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a plain request."""
        sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        sent |= {k.replace("_", "-"): v for k, v in headers.items()}
        request = urllib.request.Request(self.url + path, body, {k: v for k, v in sent.items() if v}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)


@contextmanager
def running(model: Path, masks: Path, *options: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "mftmerge", "serve", "--model", str(model), "--name", "base", "--port", "0"]
    for name in "ab":
        command += ["--mask", f"{name}={masks / name}.mask"]
    environment = os.environ | {"MFTMERGE_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert " serves base, a, b" in line, line + (process.stderr.read() if process.stderr else "")
            yield Running(process, line.split()[0])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama", layers=2)


@pytest.fixture(scope="module")
def masks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    for seed, name in enumerate("abc"):
        random_mask(model, seed, 0.6).save(folder / f"{name}.mask")
    Mask.from_bools({"model.layers.0.mlp.up_proj.weight": np.ones((8, 8), bool)}).save(folder / "other.mask")
    return folder


@pytest.fixture(scope="module")
def server(model: Path, masks: Path) -> Iterator[Running]:
    with running(model, masks, "--max-rows", "8", "--max-body", "20000", "--max-tokens", "300") as found:
        yield found


@pytest.fixture(scope="module")
def expected(model: Path, masks: Path) -> dict[tuple[str, str], str]:
    """(model, prompt) -> the greedy answer of 12 tokens, by transformers, under that mask alone."""
    live, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    switcher = attach(live, {name: masks / f"{name}.mask" for name in "abc"})
    found = {}
    for name in (None, "a", "b", "c"):
        for prompt in PROMPTS:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )["input_ids"]
            with switcher.use(name):
                written = live.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
            found[name or "base", prompt] = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    assert len(set(found.values())) > 20  # nearly all different, so a mix-up shows
    return found


def chat(client: Any, model: str, prompt: str, **more: Any) -> Any:
    how = {"max_tokens": 12, "temperature": 0} | more
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], **how)


def test_each_model_answers_under_its_mask(server: Running, expected: dict[tuple[str, str], str]) -> None:
    client = server.client()
    assert [m.id for m in client.models.list()] == ["base", "a", "b"]
    assert client.models.retrieve("a").id == "a"
    for name in ("base", "a", "b"):
        for prompt in PROMPTS[:3]:
            answer = chat(client, name, prompt)
            assert answer.choices[0].message.content == expected[name, prompt]
            assert answer.model == name
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            pieces = list(chat(client, name, prompt, stream=True, stream_options={"include_usage": True}))
            text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
            assert text == expected[name, prompt]
            assert pieces[-1].usage == answer.usage
            assert pieces[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_the_example_in_the_documentation(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(from openai.*?)^```", page, re.DOTALL | re.MULTILINE)
    for theirs, ours in (
        ("http://127.0.0.1:8000/v1", server.url),
        ('"none"', f'"{KEY}"'),
        ("code", "a"),
        ("math", "b"),
    ):
        program = program.replace(theirs, ours)
    exec(compile(program, "serving.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if line[:2] in ("a ", "b ")] == ["a", "b"]


def test_the_five_lines_in_the_readme(server: Running, masks: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Served\n", 1)[1].split("\n## ", 1)[0]
    start, program, add = re.findall(r"^```(?:sh|python)\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    assert len((start + program + add).splitlines()) == 5
    for theirs, ours in (("http://127.0.0.1:8000/v1", server.url), ("KEY", KEY), ("both.mask", str(masks / "c.mask"))):
        program, add = program.replace(theirs, ours), add.replace(theirs, ours)
    names: dict[str, Any] = {"openai": openai, "concurrent": concurrent}
    exec(compile(program.replace('"code", "math"', '"a", "b"'), "README.md", "exec"), names)
    assert (names["code"].model, names["math"].model) == ("a", "b")
    done = subprocess.run(add.partition("  #")[0], shell=True, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["id"] == "both"
    assert names["ask"]("both").model == "both"
    assert server.send("/masks/both", method="DELETE")[0] == 200


def test_two_hundred_at_once_with_clients_that_vanish_and_bad_bodies(
    server: Running, expected: dict[tuple[str, str], str]
) -> None:
    rng = random.Random(0)

    async def one(client: Any, number: int) -> None:
        name, prompt = rng.choice(["base", "a", "b"]), rng.choice(PROMPTS)
        if number % 10 == 0:  # vanishes
            with pytest.raises((openai.APITimeoutError, openai.APIConnectionError, TimeoutError)):
                await asyncio.wait_for(chat(client, name, prompt, max_tokens=290, logit_bias=NO_END), 0.3)
        elif number % 10 == 1:
            with pytest.raises(openai.BadRequestError):
                await chat(client, name, prompt, temperature=7)
        elif number % 10 < 6:
            assert (await chat(client, name, prompt)).choices[0].message.content == expected[name, prompt]
        elif number % 10 == 6:  # vanishes in the middle of a stream
            stream = await chat(client, name, prompt, stream=True, max_tokens=290, logit_bias=NO_END)
            await anext(stream)
            await stream.close()
        else:
            text = ""
            async for piece in await chat(client, name, prompt, stream=True):
                text += piece.choices[0].delta.content or ""
            assert text == expected[name, prompt]

    async def everybody() -> None:
        async with server.client("AsyncOpenAI") as client:
            await asyncio.gather(*(one(client, i) for i in range(200)))

    asyncio.run(everybody())
    deadline = time.monotonic() + 30
    while (found := server.health())["running"] or found["waiting"]:
        assert time.monotonic() < deadline, found  # of those that vanished nothing is left
        time.sleep(0.1)
    assert found["status"] == "ok"


def test_sampling_is_repeatable_by_seed_and_differs_without(server: Running) -> None:
    client = server.client()

    def texts(**more: Any) -> list[str]:
        answer = chat(client, "a", "hello", temperature=1, n=3, **more)
        return [choice.message.content for choice in answer.choices]

    assert texts(seed=5) == texts(seed=5)
    assert len(set(texts(seed=5))) == 3
    assert texts(seed=5) != texts(seed=6)
    assert texts(seed=5, top_p=1e-6) == texts(seed=6, top_p=1e-6)  # only the most likely token is left
    assert texts() != texts()


def test_stop_strings_end_an_answer_and_are_not_in_it(server: Running, expected: dict[tuple[str, str], str]) -> None:
    client = server.client()
    for (name, prompt), whole in expected.items():
        if name == "c" or len(whole) < 4 or "\ufffd" in whole[:6]:
            continue
        stop = whole[2:4]
        at = whole.index(stop)
        answer = chat(client, name, prompt, stop=[stop, "never"])
        assert answer.choices[0].message.content == whole[:at]
        assert answer.choices[0].finish_reason == "stop"
        pieces = list(chat(client, name, prompt, stop=stop, stream=True))
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == whole[:at]


def test_text_completions_logprobs_penalties_and_lists_of_prompts(server: Running) -> None:
    client = server.client()
    answer = client.completions.create(
        model="b",
        prompt=["hello", "one two"],
        max_tokens=5,
        temperature=0,
        logprobs=3,
        n=2,
        logit_bias=NO_END,
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == answer.choices[1].text != answer.choices[2].text
    first = answer.choices[0].logprobs
    assert len(first.tokens) == len(first.token_logprobs) == len(first.top_logprobs) == 5
    assert all(
        max(top.values()) == pytest.approx(lp) for top, lp in zip(first.top_logprobs, first.token_logprobs, strict=True)
    )
    spread = chat(client, "b", "hello", max_tokens=40, frequency_penalty=2, presence_penalty=2, logit_bias=NO_END)
    assert spread.usage.completion_tokens == 40
    entry = chat(client, "a", "hello", logprobs=True, top_logprobs=2, max_tokens=2).choices[0].logprobs.content[0]
    assert len(entry.top_logprobs) == 2
    assert entry.logprob == pytest.approx(max(t.logprob for t in entry.top_logprobs))


TURN = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "nobody"}, 404, "no model 'nobody'"),
        ({"model": 3}, 400, "model: "),
        ({"messages": []}, 400, "messages: "),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "lone surrogate"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"temperature": "hot"}, 400, "temperature: "),
        ({"top_p": 0}, 400, "top_p: "),
        ({"n": 0}, 400, "n: "),
        ({"n": 100000}, 400, "n: "),
        ({"max_tokens": 301}, 400, "more than the 300 of this server"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "give one of them"),
        ({"stop": [""]}, 400, "stop: "),
        ({"stop": ["x"] * 17}, 400, "stop: "),
        ({"tools": [{"type": "function"}]}, 400, "tools: is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format: is not supported"),
        ({"something": 1}, 400, "something: is not supported"),
        ({"logit_bias": {"99999": 1}}, 400, "no token 99999"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "the model has 1024 positions"),
        ({"messages": [{"role": "user", "content": "x" * 30000}]}, 413, "more than the 20,000 bytes"),
        ({"stream_options": 5}, 400, "stream_options"),
    ],
)
def test_bad_requests_are_refused_in_one_line(server: Running, change: dict[str, Any], status: int, words: str) -> None:
    body = {"model": "a", "messages": TURN, "max_tokens": 3} | change
    found, answer = server.send("/chat/completions", json.dumps(body).encode())
    assert found == status, answer
    assert words in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[1]", {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"temperature": NaN}', {}, 400),
        (b"[" * 15000, {}, 400),
        (b"{}", {}, 400),
        (b"{}", {"Content_Type": "text/plain"}, 415),
        (b"{}", {"Authorization": "Bearer wrong"}, 401),
        (b"{}", {"Authorization": ""}, 401),
        (b"{}", {"Authorization": "Bearer \xfc"}, 401),
    ],
)
def test_bad_bodies_and_keys(server: Running, body: bytes, headers: dict[str, str], status: int) -> None:
    for path in ("/chat/completions", "/completions"):
        found, answer = server.send(path, body, **headers)
        assert found == status, answer
        assert "\n" not in answer["error"]["message"]


def test_prompts_as_tokens_and_their_faults(server: Running) -> None:
    for prompt, status in (([5, 6, 7], 200), ([[5, 6], [7]], 200), ([-1], 400), ([10**6], 400), ([], 400), ("", 400)):
        found, answer = server.send(
            "/completions", json.dumps({"model": "a", "prompt": prompt, "max_tokens": 2}).encode()
        )
        assert found == status, (prompt, answer)
    assert server.send("/nothing")[0] == 404
    assert server.send("/models", b"{}")[0] == 405


def test_a_full_queue_is_said(server: Running) -> None:
    client = server.client()
    endless = {"max_tokens": 290, "logit_bias": NO_END, "temperature": 1}
    stream = chat(client, "a", "hello", stream=True, n=128, **endless)
    other = chat(client, "b", "hello", stream=True, n=128, **endless)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as refused:
        chat(client, "a", "hello", n=128)
    assert refused.value.response.headers["retry-after"] == "1"
    stream.close()
    other.close()


def test_masks_come_and_go_while_it_answers(server: Running, masks: Path, expected: dict[tuple[str, str], str]) -> None:
    client = server.client()
    beside = chat(client, "a", "hello", stream=True, max_tokens=250, logit_bias=NO_END)
    data = (masks / "c.mask").read_bytes()
    assert server.send("/masks/c", data, "PUT", Authorization="")[0] == 401
    status, answer = server.send("/masks/c", data, "PUT")
    assert (status, answer["id"]) == (200, "c")
    assert [m.id for m in client.models.list()] == ["base", "a", "b", "c"]
    for prompt in PROMPTS:
        assert chat(client, "c", prompt).choices[0].message.content == expected["c", prompt]
    assert sum(1 for p in beside if p.choices[0].delta.content) > 0
    for name, sent, words in (
        ("c", data, "attached already"),
        ("base", data, "the name of the model without mask"),
        ("d", data[:-9], "the mask"),
        ("d", b"nonsense", "the mask"),
        ("d", (masks / "other.mask").read_bytes(), "has shape"),
        ("no%20spaces%20here", data, "no name for a model"),
    ):
        status, answer = server.send(f"/masks/{name}", sent, "PUT")
        assert status == 400, answer
        assert words in answer["error"]["message"]
    kept = {name: Mask.load(masks / "c.mask").kept(name) for name in Mask.load(masks / "c.mask")}
    assert kept
    assert server.send("/masks/c", method="DELETE")[0] == 200
    assert server.send("/masks/c", method="DELETE")[0] == 404
    with pytest.raises(openai.NotFoundError):
        chat(client, "c", "hello")
    assert chat(client, "b", "hello").choices[0].message.content == expected["b", "hello"]


def test_health_and_metrics(server: Running) -> None:
    request = urllib.request.Request(
        server.url.removesuffix("/v1") + "/metrics", headers={"Authorization": f"Bearer {KEY}"}
    )
    with urllib.request.urlopen(request) as reply:
        text = reply.read().decode()
    assert re.search(r'mftmerge_requests_total\{model="a",status="200"\} \d', text)
    assert 'mftmerge_requests_total{model="a",status="404"}' not in text
    for name in ("prompt_tokens_total", "completion_tokens_total", "answers_running", "first_token_seconds_count"):
        assert f"mftmerge_{name}" in text
    assert server.health()["status"] == "ok"


def test_sigterm_lets_answers_finish_and_refuses_new_ones(model: Path, masks: Path) -> None:
    with running(model, masks) as server:
        client = server.client()
        stream = chat(client, "a", "hello", stream=True, max_tokens=400, logit_bias=NO_END, logprobs=True)
        pieces = iter(stream)
        next(pieces)
        for _ in range(2):  # `timeout` sends two
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.02)

        def ask_on() -> None:  # until the signal is handled
            while True:
                chat(client, "b", "hello", max_tokens=1)

        with pytest.raises(openai.InternalServerError) as refused:  # a 503, while the long answer is being written
            ask_on()
        assert refused.value.status_code == 503
        tokens = sum(len(p.choices[0].logprobs.content) for p in pieces if p.choices[0].logprobs)
        assert tokens == 400
        assert server.process.wait(30) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read().count("Traceback") == 0


def test_a_prompt_that_is_read_is_work(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between waiting and being written: a server that stops then has an answer to finish."""
    engine, seen, done = Service(str(model), ServeSettings()).engine, [], threading.Event()
    read = engine._read

    def reading(joining: Any, rows: Any) -> None:
        seen.append((engine.idle, engine.load))
        read(joining, rows)

    monkeypatch.setattr(engine, "_read", reading)
    engine.start()
    assert engine.idle
    engine.submit([Job(None, [5, 6, 7], 1, lambda event: done.set() if event.last else None)])
    assert done.wait(60)
    engine.close()
    assert seen == [(False, (1, 0))]
    assert engine.idle


def test_what_fails_for_one_answer_is_no_others_fault(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one step: temperatures that float32 has not ask for the likeliest token, and an error stays where it is."""
    engine, seen = Service(str(model), ServeSettings()).engine, {}
    failing = Sampling(temperature=0.5)

    def chosen(logits: torch.Tensor, sampling: Sampling, *more: Any) -> Chosen:
        if sampling is failing:
            raise RuntimeError("no numbers")
        return choose(logits, sampling, *more)

    monkeypatch.setattr("mftmerge.serve.engine.choose", chosen)
    wanted = {t: Sampling(temperature=t, logit_bias={2: -100}) for t in (0, 1e-46, 5e-324, 1e-37, 0.7)}
    jobs = [Job(None, [5, 6, 7], 8, seen.setdefault(id(s), []).append, s) for s in (*wanted.values(), failing)]
    engine.submit(jobs)
    engine.start()
    engine.close(60)
    assert [event.error for event in seen.pop(id(failing))] == [
        "the answer could not be written (RuntimeError: no numbers)"
    ]
    assert all(events[-1].reason == "length" for events in seen.values())
    texts = ["".join(event.text for event in seen[id(s)]) for s in wanted.values()]
    assert texts[:4] == texts[:1] * 4


def test_masks_for_another_model_and_taken_ports_stop_the_start(
    model: Path, masks: Path, server: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    from mftmerge.cli.main import main

    for options, code, words in (
        ([f"x={masks / 'other.mask'}"], 2, "has shape"),
        ([f"model={masks / 'a.mask'}", "--name", "model"], 2, "name of the model without mask"),
        ([f"a={masks / 'a.mask'}", "--require-base"], 2, "records no fingerprints"),
        ([f"a={masks / 'a.mask'}", "--port", server.url.split(":")[-1].split("/")[0]], 1, "choose another --port"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["serve", "--model", str(model), "--mask", *options])
        assert stopped.value.code == code
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_text_comes_in_whole_characters_and_equals_the_decoded_whole(model: Path) -> None:
    from mftmerge.serve.text import Transcript

    tokenizer = AutoTokenizer.from_pretrained(model)
    for text in ("naïve café, 日本語, 🙂🙃 ok", "plain", "", "ends in é"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        transcript = Transcript(tokenizer, ())
        pieces = [transcript.add(token) for token in ids]
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) + transcript.finish() == tokenizer.decode(ids)


def test_rows_join_and_leave_the_cache() -> None:
    from mftmerge.serve.rowcache import RowCache

    def layers(rows: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.rand(rows, 2, tokens, 4), torch.rand(rows, 2, tokens, 4)) for _ in range(3)]

    first, second = layers(2, 5), layers(1, 3)
    a = RowCache.of(first, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    joined = a.joined(RowCache.of(second, torch.ones(1, 3, dtype=torch.long)))
    assert joined.mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    left = joined.only([0, 2])
    assert left.mask.tolist() == [[1, 1, 1], [1, 1, 1]]
    for (k, v), (k1, _), (_, v2) in zip(left.layers, first, second, strict=True):
        assert torch.equal(k[0], k1[0, :, 2:])
        assert torch.equal(v[1], v2[0])
