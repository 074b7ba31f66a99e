"""Serve one base model with several masks: `python examples/hot_switch.py MODEL code=code.mask math=math.mask`.

Reads lines such as `code: write a function that ...` and answers under the mask of that name (or under none). Switching
restores stored originals, so the model is bit for bit the same after any number of switches.
"""

from __future__ import annotations

import contextlib
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import mftmerge


def main(path: str, named: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    masks = {name: mftmerge.Mask.load(file) for name, file in (item.split("=", 1) for item in named)}
    switcher = mftmerge.attach(model, masks)
    for line in sys.stdin:
        name, _, prompt = line.strip().partition(": ")
        if name not in masks:
            name, prompt = "", line.strip()
        chat = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with switcher.use(name) if name else contextlib.nullcontext():
            tokens = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        answer = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"[{name or 'base'}] {answer}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
