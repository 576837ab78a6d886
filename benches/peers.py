"""llama.cpp and torch on the models that `cargo bench --bench speed -- --write` has written."""

import ctypes
import os
import sys
import time

PROMPTS, DECODE, THREADS, RUNS = (512, 2048), 64, 2, 3
KINDS = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_k": 14}  # llama_ftype; Q4_K_S


def ids(count):
    return [3 + i * 7919 % 40_000 for i in range(count)]


def row(engine, kind, figures):
    print(f"| {engine} | {kind} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |", flush=True)


def best(run):
    return min(run() for _ in range(RUNS))


def llama_cpp(folder):
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    source = os.path.join(folder, "smollm2.gguf")
    for kind, ftype in KINDS.items():
        path = os.path.join(folder, f"{kind}.gguf")
        if not os.path.exists(path):
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype, how.allow_requantize, how.nthread = ftype, True, THREADS
            if llama_cpp.llama_model_quantize(source.encode(), path.encode(), ctypes.byref(how)):
                raise SystemExit(f"llama.cpp could not write {path}")
        model = llama_cpp.Llama(
            path, n_ctx=max(PROMPTS) + DECODE, n_batch=512, n_threads=THREADS,
            n_threads_batch=THREADS, verbose=False,
        )

        def prefill(count):
            model.reset()
            start = time.perf_counter()
            model.eval(ids(count))
            return time.perf_counter() - start

        def decode():
            model.reset()
            model.eval(ids(PROMPTS[0]))
            start = time.perf_counter()
            for i in range(DECODE):
                model.eval([5 + i])
            return time.perf_counter() - start

        figures = [count / best(lambda: prefill(count)) for count in PROMPTS]
        row("llama.cpp", kind, figures + [DECODE / best(decode)])
        del model


def torch(folder):
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f"torch left out: {error}", file=sys.stderr)
        return
    torch.set_num_threads(THREADS)
    for kind, dtype in {"f32": torch.float32, "bf16": torch.bfloat16}.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            os.path.join(folder, "f32"), torch_dtype=dtype
        ).eval()

        @torch.no_grad()
        def prefill(count):
            start = time.perf_counter()
            model(torch.tensor([ids(count)]), use_cache=True, logits_to_keep=1)
            return time.perf_counter() - start

        @torch.no_grad()
        def decode():
            cache = model(torch.tensor([ids(PROMPTS[0])]), use_cache=True, logits_to_keep=1)
            cache = cache.past_key_values
            start = time.perf_counter()
            for i in range(DECODE):
                cache = model(torch.tensor([[5 + i]]), past_key_values=cache, use_cache=True)
                cache = cache.past_key_values
            return time.perf_counter() - start

        figures = [count / best(lambda: prefill(count)) for count in PROMPTS]
        row("torch", kind, figures + [DECODE / best(decode)])


if __name__ == "__main__":
    print("| engine | weights | prefill 512 | prefill 2048 | decode |\n|---|---|---|---|---|")
    llama_cpp(sys.argv[1])
    torch(sys.argv[1])
