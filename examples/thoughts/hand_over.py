#!/usr/bin/env python3
"""Thoughts of `hybrid think` as a prompt for transformers, or for vLLM.

    hybrid think --model MODEL --passes 3 --prompt "Why is the sky blue?" --out thoughts.safetensors
    python hand_over.py transformers MODEL thoughts.safetensors
    python hand_over.py vllm MODEL thoughts.safetensors
    python hand_over.py http MODEL thoughts.pt --url http://localhost:8000   # vllm serve MODEL --enable-prompt-embeds

Each prints a JSON object with the greedy answer: its text, and where the engine tells, ids and log-probabilities.
"""
import argparse
import base64
import json
import sys
import urllib.request


def read(path):
    """The embeddings, (tokens, hidden), in float32."""
    if path.endswith(".pt"):
        import torch

        return torch.load(path, weights_only=True)
    from safetensors.torch import load_file

    return load_file(path)["prompt_embeds"]


def with_transformers(model, path, max_tokens):
    import torch
    from transformers import AutoModelForCausalLM

    engine = AutoModelForCausalLM.from_pretrained(model)
    embeds = read(path)[None].to(engine.dtype)  # (1, tokens, hidden)
    out = engine.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = out.sequences[0]  # of the answer alone: the prompt had no ids
    scores = torch.log_softmax(torch.cat(out.logits).float(), -1)  # (tokens, vocabulary)
    return {"ids": ids.tolist(), "logprobs": scores.gather(1, ids[:, None])[:, 0].tolist(), "text": decoded(model, ids)}


def with_vllm(model, path, max_tokens):
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, enable_prompt_embeds=True)
    embeds = read(path).to(engine.llm_engine.model_config.dtype)
    how = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0)
    answer = engine.generate({"prompt_embeds": embeds}, how)[0].outputs[0]
    ids = list(answer.token_ids)
    logprobs = [at[id].logprob for id, at in zip(ids, answer.logprobs)]
    return {"ids": ids, "logprobs": logprobs, "text": answer.text}


def over_http(model, path, max_tokens, url):
    """The server takes what torch.save writes, in base64: the bytes of the .pt file. Needs no torch here."""
    if path.endswith(".pt"):
        saved = open(path, "rb").read()
    else:
        import io
        import torch

        torch.save(read(path), file := io.BytesIO())
        saved = file.getvalue()
    asked = {
        "model": model,
        "prompt": "",  # none beside the embeddings
        "prompt_embeds": base64.b64encode(saved).decode(),
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 0,  # of the tokens that were chosen, and no others
    }
    request = urllib.request.Request(
        url.rstrip("/") + "/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        answer = json.load(response)["choices"][0]
    return {"logprobs": (answer.get("logprobs") or {}).get("token_logprobs"), "text": answer["text"]}


def decoded(model, ids):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model).decode(ids, skip_special_tokens=True)
    except Exception as error:  # a checkpoint of ids alone
        print("no text:", str(error).splitlines()[0], file=sys.stderr)
        return None


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("engine", choices=["transformers", "vllm", "http"])
    arguments.add_argument("model", help="the folder that the thoughts were made with, or its name on the server")
    arguments.add_argument("thoughts", help="NAME.safetensors or NAME.pt")
    arguments.add_argument("--max-tokens", type=int, default=128)
    arguments.add_argument("--url", default="http://localhost:8000", help="the server")
    a = arguments.parse_args()
    if a.engine == "transformers":
        answer = with_transformers(a.model, a.thoughts, a.max_tokens)
    elif a.engine == "vllm":
        answer = with_vllm(a.model, a.thoughts, a.max_tokens)
    else:
        answer = over_http(a.model, a.thoughts, a.max_tokens, a.url)
    print(json.dumps(answer))
