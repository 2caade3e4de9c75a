"""A vLLM server as TRL's client sees it, on this machine: the rest of the played vLLM, and what it was asked, in order.

It refuses what vLLM 0.31.0 refuses: weights outside of an update, of other names or shapes, while another update is
under way (v1/worker/gpu_worker.py:1460-1536); completions of prompts that are too long.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import torch
import vllm


class Server(ThreadingHTTPServer):
    """Endpoints of `vllm serve MODEL` with VLLM_SERVER_DEV_MODE=1.

    Attributes:
        asked: every request, in order.
        sent: tensors that came over the weight-transfer group and wait for an update.
    """

    def __init__(self, model: str, max_model_len: int, mode: str = "processed_logprobs") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        engine = {"generation_config": "vllm", "logprobs_mode": mode, "load_format": "dummy", "dtype": "float32"}
        self.llm = vllm.LLM(model, max_model_len=max_model_len, **engine)
        self.configuration = {"max_model_len": max_model_len, "logprobs_mode": mode}
        self.asked: list[Any] = []
        self.sent: list[torch.Tensor] = []
        self.updating = self.connected = False
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def update(self, names: list[str], dtypes: list[str], shapes: list[list[int]]) -> None:
        assert self.updating, "start_weight_update must be called before update_weights."
        received = []
        for name, dtype, shape, tensor in zip(names, dtypes, shapes, self.wait(len(names)), strict=True):
            assert tuple(tensor.shape) == tuple(shape)
            assert str(tensor.dtype) == f"torch.{dtype}"
            assert tensor.is_contiguous()
            received.append((name, tensor))
        self.llm.model.load_weights(received)

    def wait(self, count: int) -> list[torch.Tensor]:
        """The update's tensors, which are broadcast while the request is under way."""
        from time import sleep

        while len(self.sent) < count:
            sleep(0.001)
        found, self.sent = self.sent, []
        return found

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        known = (
            "model",
            "prompt",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "n",
            "repetition_penalty",
            "top_k",
        )
        settings = {key: value for key, value in body.items() if key not in (*known, "min_p")}
        neutral = {"n": 1, "repetition_penalty": 1.0, "top_k": 0, "min_p": 0.0}
        assert {key: body[key] for key in neutral} == neutral
        params = vllm.SamplingParams(**settings)
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in body["prompt"]], [params] * len(body["prompt"])
        )
        choices = []
        for prompt, output in zip(body["prompt"], outputs, strict=True):
            tokens = output.outputs[0].token_ids
            values = [each[token].logprob for token, each in zip(tokens, output.outputs[0].logprobs, strict=True)]
            named = [f"token_id:{token}" for token in tokens]
            logprobs = {"tokens": named, "token_logprobs": values, "top_logprobs": [None] * len(tokens)}
            choices.append({"prompt_token_ids": prompt, "token_ids": tokens, "logprobs": logprobs})
        return choices


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        answers: dict[str, Any] = {
            "/health": {},
            "/v1/models": {"data": [{"id": "served"}]},
            "/get_world_size": {"world_size": 1},
            "/server_info": {"vllm_config": {"model_config": self.server.configuration, "weight_transfer_config": {}}},
        }
        self._answer(answers[path])

    def do_POST(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(text) if text else {}
        server.asked.append((path, body))
        answer: dict[str, Any] = {"success": True}
        if path == "/init_weight_transfer_engine":
            assert body["init_info"]["rank_offset"] == 1
            assert body["init_info"]["world_size"] == 2
            server.connected = True
        elif path == "/start_weight_update":
            assert server.connected
            assert not server.updating
            server.updating = True
        elif path == "/update_weights":
            info = body["update_info"]
            server.update(info["names"], info["dtype_names"], info["shapes"])
        elif path == "/finish_weight_update":
            assert server.updating
            server.updating = False
        elif path == "/v1/completions":
            assert not server.updating
            answer = {"choices": server.complete(body)}
        else:
            assert path == "/reset_prefix_cache"
        self._answer(answer)

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...
