"""Offline inference."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

import sglang
from tests.e2e.serving import Server

GREEDY = {"temperature": 0, "max_new_tokens": 12}
PROMPTS = ["The capital of France is", "1, 2, 3,", "Once upon a time", "☃ こんにちは"]


@pytest.fixture(scope="module")
def llm():
    with sglang.LLM(device="cpu", dtype="float32", max_total_tokens=4096) as llm:
        yield llm


def test_offline_replies_are_the_servers(llm, server: Server):
    online = server.generate(text=PROMPTS, sampling_params=GREEDY)
    offline = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for on, off in zip(online, offline, strict=True):
        assert off["text"] == on["text"] and off["output_ids"] == on["output_ids"]
        assert off["meta_info"]["finish_reason"] == on["meta_info"]["finish_reason"]
        assert off["meta_info"]["prompt_tokens"] == on["meta_info"]["prompt_tokens"]


def test_a_prompt_may_be_a_text_ids_or_a_list_of_either(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    expected = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
    assert len(expected) == 1
    array = np.array(ids)
    for prompt in ([PROMPTS[0]], ids, [ids], array, [array], array[None], list(array), tuple(ids)):
        reply = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert [r["text"] for r in reply] == [expected[0]["text"]]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [sglang.SamplingParams(temperature=0, max_new_tokens=n) for n in (1, 5, 9, 3)]
    replies = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [r["meta_info"]["completion_tokens"] for r in replies] == [1, 5, 9, 3]
    assert [len(r["output_ids"]) for r in replies] == [1, 5, 9, 3]


def test_a_prompt_may_have_several_samples(llm):
    params = {"temperature": 1.0, "max_new_tokens": 8, "seed": 5}
    replies = llm.generate(PROMPTS[:2], [{**params, "n": 3}, GREEDY], use_tqdm=False)
    assert len(replies) == 4
    alone = [{**params, "seed": seed} for seed in (5, 6, 7)]
    expected = llm.generate([PROMPTS[0]] * 3 + [PROMPTS[1]], (*alone, GREEDY), use_tqdm=False)
    assert [r["text"] for r in replies] == [r["text"] for r in expected]
    assert len({r["text"] for r in replies[:3]}) == 3


def test_stop_strings_and_stop_tokens_work_offline(llm):
    stop = llm.generate(PROMPTS[1], {**GREEDY, "stop": "7,"}, use_tqdm=False)[0]
    assert stop["text"] == " 4, 5, 6, "
    assert stop["meta_info"]["finish_reason"] == {"type": "stop", "matched": "7,"}
    stop = llm.generate(PROMPTS[0], {**GREEDY, "stop_token_ids": [30]}, use_tqdm=False)[0]
    assert stop["text"] == " Paris" and stop["output_ids"] == [7042, 30]


def test_grammars_are_obeyed_offline(llm):
    params = [{**GREEDY, "regex": r" (Paris|Rome)\."}, GREEDY, {**GREEDY, "ebnf": 'root ::= "no"'}]
    replies = llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)
    plain = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]
    assert [r["text"] for r in replies] == [" Paris.", plain["text"], "no"]
    with pytest.raises(ValueError, match="regex is not one that this server can follow"):
        llm.generate("hi", {"regex": "("}, use_tqdm=False)


def test_more_prompts_than_seats_and_slots_all_come_back_right(llm):
    prompts = [f"{i}, {i + 1}," for i in range(150)]
    replies = llm.generate(prompts, {**GREEDY, "max_new_tokens": 4}, use_tqdm=True)
    for i in range(0, 150, 37):
        alone = llm.generate(prompts[i], {**GREEDY, "max_new_tokens": 4}, use_tqdm=False)
        assert replies[i]["output_ids"] == alone[0]["output_ids"]
    stats = llm.stats()
    assert stats.used_tokens == stats.running == stats.queued == 0


def test_the_cache_can_be_flushed(llm):
    llm.generate("Twice told tales are", GREEDY, use_tqdm=False)
    llm.flush_cache()
    reply = llm.generate("Twice told tales are", GREEDY, use_tqdm=False)[0]
    assert reply["meta_info"]["cached_tokens"] == 0


@pytest.mark.parametrize(
    ("prompts", "params", "part"),
    [
        (["hi", ""], GREEDY, r"prompts\[1\]: prompt must not be empty"),
        ("hi", {"temperature": -1}, "temperature must be"),
        ("hi", {"temprature": 1}, "temprature is not"),
        ("hi", {"n": 0}, "n must be an integer >= 1, got 0"),
        ("hi", [GREEDY, GREEDY], "2 entries for 1 prompts"),
        ([[49152]], GREEDY, r"\[0, 49152\), got 49152"),
        ([[1, "a"]], GREEDY, r"prompts\[0\]: prompt token ids must be integers"),
        ({"text": "hi"}, GREEDY, "prompts must be a text or a list of token ids"),
        (b"hi", GREEDY, "prompts must be a text"),
        (["hi", b"hi"], GREEDY, r"prompts\[1\] must be a text"),
        ([True], GREEDY, r"prompts\[0\] must be a text"),
        ([{"prompt": "hi"}], GREEDY, r"prompts\[0\] must be a text"),
        ([[1] * 4000], {"max_new_tokens": 97}, r"\(--max-total-tokens\) holds 4096"),
    ],
)
def test_what_is_wrong_with_a_call_is_a_value_error(llm, prompts, params, part):
    with pytest.raises(ValueError, match=part):
        llm.generate(prompts, params, use_tqdm=False)


def test_a_wrong_prompt_among_many_ends_the_others(llm, monkeypatch):
    monkeypatch.setattr("sglang.server.llm._SEND_SECONDS", 0.0)  # they run before it is looked at
    with pytest.raises(ValueError, match=r"prompts\[40\]: prompt must not be empty"):
        llm.generate(["hi"] * 40 + [""], {**GREEDY, "max_new_tokens": 500}, use_tqdm=False)
    assert llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["text"].startswith(" Paris")
    while (stats := llm.stats()).running:
        time.sleep(0.01)
    assert stats.used_tokens == stats.queued == 0


SCRIPT = """
import sglang
llm = sglang.LLM(device="cpu", skip_tokenizer_init=True)
print(llm.generate([[504, 3575, 282, 4649, 314]], {"temperature": 0, "max_new_tokens": 4}))
%s
"""


def run_script(ending: str) -> subprocess.CompletedProcess:
    """From standard input, where there is no file that a child could import."""
    script = SCRIPT % ending
    return subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, timeout=60
    )


def test_a_plain_script_without_a_main_guard_runs_and_leaves_nothing_behind():
    run = run_script("import psutil; print(*[p.pid for p in psutil.Process().children()])")
    assert run.returncode == 0, run.stderr
    reply, pids = run.stdout.splitlines()
    assert "[7042, 30, 198, 198]" in reply and "'text'" not in reply
    assert "generate: 100%" in run.stderr
    assert len(pids.split()) == 2
    assert not any(psutil.pid_exists(int(pid)) for pid in pids.split())


def test_a_dead_process_is_an_error_in_the_next_call():
    before = set(psutil.Process().children())
    with sglang.LLM(device="cpu") as llm:
        children = set(psutil.Process().children()) - before
        worker = next(child for child in children if child.cmdline()[-1] == "model worker 0")
        worker.send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeError, match="model worker 0 was killed by signal 9"):
            llm.generate("hi", use_tqdm=False)
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("hi", use_tqdm=False)
    assert not any(child.is_running() for child in children)
