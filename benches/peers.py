"""This crate, llama.cpp and torch on the models that `cargo bench --bench speed -- --write` has written.

They take turns, as a shared machine is not as fast at one time as at another, and the best of each counts.

    python benches/peers.py FOLDER [f32] [bf16] [q8_0] [q4_k]
"""

import ctypes
import os
import subprocess
import sys
import time

PROMPTS, DECODE, THREADS, RUNS, ROUNDS = (512, 2048), 64, 2, 2, 3
KINDS = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_k": 14}  # llama_ftype; Q4_K_S


def ids(count):
    return [3 + i * 7919 % 40_000 for i in range(count)]


def best(run):
    return min(run() for _ in range(RUNS))


def this_crate(folder, kind):
    command = ["cargo", "bench", "-q", "--bench", "speed", "--", "--only", kind, os.path.join(folder, "f32")]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [float(figure) for figure in out.split()]


def this_crate_fast(folder, kind):
    return this_crate(folder, f"{kind} fast")


def llama_cpp(folder, kind):
    import llama_cpp

    # Kept, because llama.cpp goes on calling it.
    llama_cpp.quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(llama_cpp.quiet, ctypes.c_void_p(0))
    path = os.path.join(folder, f"{kind}.gguf")
    if not os.path.exists(path):
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize, how.nthread = KINDS[kind], True, THREADS
        source = os.path.join(folder, "smollm2.gguf")
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

    figures = [count / best(lambda: prefill(count)) for count in PROMPTS] + [DECODE / best(decode)]
    model.close()
    return figures


def torch(folder, kind):
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[kind]
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

    return [count / best(lambda: prefill(count)) for count in PROMPTS] + [DECODE / best(decode)]


def main(folder, *kinds):
    print("| engine | weights | prefill 512 | prefill 2048 | decode |\n|---|---|---|---|---|")
    for kind in kinds or KINDS:
        engines = {"this crate": this_crate, "llama.cpp": llama_cpp}
        if kind != "f32":
            engines["this crate, fast"] = this_crate_fast
        if kind in ("f32", "bf16"):
            engines["torch"] = torch
        figures = {name: [0.0] * 3 for name in engines}
        for _ in range(ROUNDS):
            for name, engine in list(engines.items()):
                try:
                    found = engine(folder, kind)
                except ImportError as error:
                    print(f"{name} left out: {error}", file=sys.stderr)
                    del engines[name], figures[name]
                    continue
                figures[name] = [max(pair) for pair in zip(figures[name], found)]
        for name, best_of_all in figures.items():
            cells = " | ".join(f"{figure:.0f}" for figure in best_of_all)
            print(f"| {name} | {kind} | {cells} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
