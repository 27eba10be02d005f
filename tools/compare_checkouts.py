"""
Two checkouts of this project, the same commands: do they give the same bits?

    git clone . /tmp/before && (cd /tmp/before && git checkout COMMIT)
    python tools/compare_checkouts.py /tmp/before .

Compared are the files of a data set, the weights after 20 training steps with each encoding and
optimizer, and what checkpoints of the first checkout score and write in the second one. Exit code 1
if anything differs. Ten minutes on one core.

Without dropout, whose random draws have changed since 54e44c4: they now depend on seed and step.
"""
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ENCODINGS = "nope learned sinusoidal rope prope hope alibi t5 kerple fire".split()
OPTIMIZERS = "adamw", "muon"
NETWORK = ("--block_size 32 --n_layer 2 --n_head 4 --n_embd 64 --batch_size 8 --warmup_iters 5 "
           "--learning_rate 1e-2 --min_lr 2e-4 --max_iters 20 --eval_interval 10 --eval_iters 2 "
           "--device cpu").split()
SCALINGS = "--rope_scaling none pi ntk yarn --attn_scaling none logn".split()


def run(checkout, *command):
    """Run a script of a checkout with one thread -> what it printed."""
    done = subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def sha256(data):
    return hashlib.sha256(data).hexdigest()[:16]


def weights(folder):
    """sha256 of all weights of a run."""
    model = torch.load(f"{folder}/ckpt.pt", weights_only=True)["model"]
    content = (name.encode() + model[name].numpy().tobytes() for name in sorted(model))
    return sha256(b"".join(content))


def fingerprint(checkout, folder, checkpoints):
    """Name of a result -> its sha256. checkpoints: the folder of those that score and sample."""
    generator, found = random.Random(0), {}
    (folder / "text").mkdir(parents=True)
    for i in range(60):
        words = (generator.choice(["alpha", "beta", "gamma\n", "delta é"]) for _ in range(800))
        (folder / "text" / f"{i}.txt").write_text(" ".join(words))
    for kind in ("char", "bpe"):
        path = folder / kind
        run(checkout, "-m", "data.prepare", "--source", str(folder / "text"), "--out_dir",
            str(path), "--tokenizer", kind, "--vocab_size", "400", "--charset", "ascii")
        for file in sorted(path.glob("*.*")):
            if file.name != "meta.json":
                found[f"data set {kind}/{file.name}"] = sha256(file.read_bytes())
        meta = json.loads((path / "meta.json").read_text())
        found[f"data set {kind}, sha256 of the text"] = meta["sha256"][:16]
    for optimizer in OPTIMIZERS:
        for pe in ENCODINGS:
            out_dir = folder / f"{pe}_{optimizer}"
            run(checkout, "train.py", "--pe", pe, "--dataset", str(folder / "char"), "--out_dir",
                str(out_dir), "--optimizer", optimizer, *NETWORK)
            found[f"weights of {pe} after 20 steps of {optimizer}"] = weights(out_dir)
    paths = [str(checkpoints / f"{pe}_adamw") for pe in ENCODINGS]
    run(checkout, "eval_extrapolation.py", *paths, *SCALINGS, "--dataset",
        str(checkpoints / "char"), "--windows", "4", "--json", str(folder / "scores.json"))
    for row in json.loads((folder / "scores.json").read_text())["runs"]:
        buckets = json.dumps(row["buckets"], sort_keys=True)
        found[f"scores of {row['name']}"] = sha256(buckets.encode())
    for pe, path in zip(ENCODINGS, paths):
        for scaling in ("none", "yarn") if pe in ("rope", "prope", "hope") else ("none",):
            for top_k in ("1", "20"):
                text = run(checkout, "sample.py", path, "--start", "alpha", "--top_k", top_k,
                           "--max_new_tokens", "100", "--rope_scaling", scaling)
                name = f"text of {pe}, top_k {top_k}, rope_scaling {scaling}"
                found[name] = sha256(text.encode())
    return found


def main():
    before, after = (Path(path).resolve() for path in sys.argv[1:3])
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder, "a"), Path(folder, "b")
        first, second = fingerprint(before, a, a), fingerprint(after, b, a)
        for name, value in first.items():
            other = second.get(name)
            print(f"{'same' if other == value else 'DIFFERENT':10} {name:45} {value} {other}")
    sys.exit(first != second)


if __name__ == "__main__":
    main()
