"""Environments as people publish them for verifiers: `load_environment` and a rubric."""

from __future__ import annotations

import os
import re
import time
from typing import Any

import verifiers as vf
from datasets import Dataset

SUMS = [{"question": f"{i}+{j}", "answer": str(i + j), "info": {"terms": [i, j]}} for i in range(8) for j in range(5)]


def right(parser: Any, completion: Any, answer: str, **_: Any) -> float:
    return float((parser.parse_answer(completion) or "").strip() == answer)


async def near(completion: Any, info: Any, state: Any) -> float:
    """Raises where the completion is no number, which the library counts as 0."""
    assert state["completion"] == completion
    assert completion[0].role == "assistant"
    return 1 / (1 + abs(int(completion[0].content) - sum(info["terms"])))


def length(completion: Any) -> int:
    return len(completion[-1]["content"])


def load_environment(count: int = 40, bonus: float = 0.5, evaluation: bool = False) -> vf.Environment:
    parser = vf.Parser()
    rubric = vf.Rubric(funcs=[right, near, length], weights=[1.0, bonus, 0.0], parser=parser)
    data = {"eval_dataset": Dataset.from_list(SUMS[3:6])} if evaluation else {}
    return vf.SingleTurnEnv(
        dataset=Dataset.from_list(SUMS[:count]), system_prompt="Add.", parser=parser, rubric=rubric, **data
    )


def thinking() -> vf.Environment:
    """Chat messages as the prompt, two rubrics, parsers of the library."""
    parser = vf.XMLParser(["reasoning", "answer"], answer_field="answer")
    rows = [{"prompt": [{"role": "user", "content": f"Say {n}"}], "answer": str(n)} for n in range(20)]
    rubric = vf.RubricGroup(
        [
            vf.Rubric(funcs=[right], parser=parser),
            vf.Rubric(funcs=[parser.get_format_reward_func()], weights=[0.25], parser=parser),
        ]
    )
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), parser=parser, rubric=rubric)


def slow() -> vf.Environment:
    def patient(completion: Any) -> float:
        text = completion[-1]["content"]
        if text == "wait":
            time.sleep(60)
        if text == "end":
            os._exit(3)
        if text == "eat":
            return float(len(bytearray(64 << 30)))
        return 1.0

    return vf.SingleTurnEnv(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[patient]))


def grouped() -> vf.Environment:
    def best(completions: Any) -> list[float]:
        return [0.0 for _ in completions]

    return vf.SingleTurnEnv(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[best]))


class Guessing(vf.MultiTurnEnv):
    """Guess the sum; ends when it is right."""

    async def setup_state(self, state: Any) -> Any:
        state["guesses"] = []
        return state

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        guess, truth = str(messages[-1].content).strip(), int(state["answer"])
        state["guesses"].append(guess)
        if guess == str(truth):
            state["final_env_response"] = [{"role": "user", "content": "right"}]
            return []
        hint = "no number" if not guess.isdecimal() else "higher" if int(guess) < truth else "lower"
        return [{"role": "user", "content": f"{hint}, {len(state['guesses'])}"}]


def guessed(state: Any, answer: str) -> float:
    return float(answer in state["guesses"])


def several_turns() -> vf.Environment:
    return Guessing(max_turns=4, dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[guessed]))


class Clock(vf.MultiTurnEnv):
    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        return [{"role": "user", "content": str(time.perf_counter_ns())}]


def clock() -> vf.Environment:
    return Clock(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[right]))


class Summarising(Guessing):
    async def get_prompt_messages(self, state: Any) -> Any:
        return state["prompt"]


def rewriting() -> vf.Environment:
    return Summarising(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[right]))


def tools() -> vf.Environment:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    return vf.ToolEnv(tools=[add], dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[right]))


def calling() -> vf.Environment:
    """One turn, in which a tool is to be called."""

    def called(completion: Any) -> float:
        calls = completion[-1].tool_calls or []
        return float([(each.name, each.arguments) for each in calls] == [("look", '{"at": "sky"}')])

    look = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
    return vf.SingleTurnEnv(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[called]), tool_defs=[look])


def named_reward() -> vf.Environment:
    def reward(completion: Any) -> float:
        return 0.5

    return vf.SingleTurnEnv(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[reward], weights=[3.0]))


def a_group() -> vf.Environment:
    return vf.EnvGroup([load_environment(), load_environment()], env_names=["one", "two"])


def evaluated_only() -> vf.Environment:
    return vf.SingleTurnEnv(eval_dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[right]))


def unweighted() -> vf.Environment:
    return vf.SingleTurnEnv(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[right], weights=[0.0]))


def picture() -> vf.Environment:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    rows = [{"prompt": [{"role": "user", "content": [part]}], "answer": "a"}]
    return vf.SingleTurnEnv(dataset=Dataset.from_list(rows), rubric=vf.Rubric(funcs=[right]))


def failing() -> vf.Environment:
    raise KeyError("OPENAI_API_KEY")


class Broken(vf.SingleTurnEnv):
    async def setup_state(self, state: Any) -> Any:
        raise vf.InfraError("no sandbox")


def broken() -> vf.Environment:
    return Broken(dataset=Dataset.from_list(SUMS), rubric=vf.Rubric(funcs=[right]))


def no_environment() -> Any:
    return re.compile("x")
