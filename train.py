"""
Train a GPT on one GPU, or on a CPU:

    python train.py                                        HoPE on the default text: minutes on two CPU cores
    python train.py @config/cpu_demo --pe rope --out_dir out/rope
    python train.py --resume --out_dir out/rope            go on after an interruption
    torchrun --nproc_per_node=4 train.py @config/cpu_demo --gradient_accumulation_steps 4     several GPUs

Two runs with the same --seed see the same batches and start from the same shared weights whatever their encoding,
so that what differs between them is the encoding. A run leaves OUT_DIR/ckpt.pt (the latest state, all that --resume
needs), OUT_DIR/best.pt (weights with the lowest validation loss) and OUT_DIR/log.jsonl (a line per evaluation).
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cli
from data.prepare import DEFAULT_DATASET, open_dataset
from model import GPT, PE, GPTConfig, RoPE, load_checkpoint

# ---------------------------------------------------------------------------------------------------------------
# Data


def token_tensor(ids, device):
    """A token file, uint16 (N,), as the tensor that batch_at reads: on the GPU if it fits there, else on the disk.

    On the GPU, where it may take a tenth of the free memory, all that has to travel at a step are the batch's offsets.
    """
    ids = torch.from_numpy(ids.view(np.int16))            # the same bits: torch has few operations for uint16
    fits = device.type == "cuda" and 10 * ids.nbytes < torch.cuda.mem_get_info(device)[0]
    return ids.to(device) if fits else ids


def batch_at(ids, offsets, block_size, device):
    """Windows of a token tensor at each offset -> inputs and targets, int64 (B, L), the targets one token later."""
    offsets = torch.from_numpy(offsets).to(ids.device, non_blocking=True)                    # (B,)
    rows = ids[offsets[:, None] + torch.arange(block_size + 1, device=ids.device)]           # (B, L + 1)
    if device.type == "cuda" and rows.device.type == "cpu":
        rows = rows.pin_memory().to(device, non_blocking=True)  # pinned: the copy runs while the GPU computes
    rows = rows.to(device).long() & 0xFFFF                # unsigned again
    return rows[:, :-1], rows[:, 1:]


def training_batch(ids, batch_size, block_size, seed, index, device):
    """The index-th batch of a seed. It depends on these two numbers alone: on no encoding, no evaluation, no resume."""
    offsets = np.random.default_rng((seed, index)).integers(len(ids) - block_size, size=batch_size)
    return batch_at(ids, offsets, block_size, device)


@torch.no_grad()
def validation_loss(model, ids, batch_size, block_size, n_batches, device, autocast):
    """Mean loss in nats per token over windows spread evenly over the validation text, the same at each call."""
    offsets = np.linspace(0, len(ids) - block_size - 1, num=n_batches * batch_size, dtype=np.int64)
    model.eval()
    total = 0.0
    for part in offsets.reshape(n_batches, batch_size):
        with autocast:
            total += model(*batch_at(ids, part, block_size, device))[1].item()
    model.train()
    return total / n_batches


# ---------------------------------------------------------------------------------------------------------------
# Optimization


def make_optimizer(model, args, device):
    """AdamW. Matrices decay; biases, norms and all that an encoding learns do not."""
    decay = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decay[parameter.dim() >= 2 and not name.startswith("transformer.wpe.")].append(parameter)
    groups = [{"params": decay[True], "weight_decay": args.weight_decay},
              {"params": decay[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(args.beta1, args.beta2),
                             fused=device.type in ("cpu", "cuda", "mps"))


def learning_rate_at(step, args):
    """Linear warm-up over warmup_iters steps, then half a cosine down to min_lr at lr_decay_iters."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / (args.warmup_iters + 1)
    progress = min(1.0, (step - args.warmup_iters) / max(1, args.lr_decay_iters - args.warmup_iters))
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (args.learning_rate - args.min_lr)


def memory_estimate(config, args, dtype):
    """Bytes that training needs, roughly: weights, gradient, AdamW's two moments, and what backward remembers."""
    C, V, tokens = config.n_embd, config.vocab_size, args.batch_size * config.block_size
    weights = 12 * config.n_layer * C * C + V * C
    per_layer = 22 * C                                    # norms 2, q k v and their turned copies 5, attention and ...
    logits = 3 * V                                        # ... its projection 3, the four times wider MLP 12
    return 16 * weights + tokens * (config.n_layer * per_layer * dtype.itemsize + logits * 4)


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


@dataclass
class Progress:
    """How far a run is: all there is to keep besides weights, optimizer and dropout's random numbers."""

    iter: int = 0                                         # steps done
    best_val_loss: float = math.inf                       # nats per token
    seconds: float = 0.0                                  # spent so far, earlier sessions included
    logged: int = -1                                      # the step of the last line in log.jsonl


def save(path, checkpoint):
    """Write beside the place, then rename: whenever we are killed, the file that stands there is a whole one.

    Raises OSError where that fails, as on a full disk; the file that stood there is left as it was.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())                       # on the disk before the name points to it
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:              # torch reports a failed write as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, the one before it is kept: {error}") from error


def get_rng_state(device):
    """The state of dropout's random numbers. Batches need none: they are a function of the step."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None}


def set_rng_state(state, device):
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def cut_log(path, last_iter):
    """Drop the lines behind a step, which a resumed run does again, and a last line that a kill cut short."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["iter"] <= last_iter:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):         # no line of ours
            break
    path.write_text("".join(kept))


# ---------------------------------------------------------------------------------------------------------------
# Several processes, each with its own GPU: they take turns at the forwards of a step and share the mean gradient


def join_processes(device):
    """Join those that torchrun started, if it did -> rank, number of processes."""
    if "RANK" not in os.environ:
        return 0, 1
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


# ---------------------------------------------------------------------------------------------------------------


def make_parser():
    parser = cli.ArgumentParser("Train a GPT. Flags can be kept in a file: python train.py @config/cpu_demo --pe rope")
    defaults = GPTConfig()
    count, amount, share = cli.number(int, 1), cli.number(float, 0), cli.number(float, 0, 0.9999)

    add = parser.add_argument_group("text and results").add_argument
    add("--dataset", default=DEFAULT_DATASET, help="folder made by data.prepare; the default one is made by itself")
    add("--out_dir", default="out/default", help="folder for checkpoints and log")
    add("--resume", action="store_true", help="go on from out_dir/ckpt.pt, with the flags kept in it")
    add("--seed", type=cli.number(int, 0, 2**32), default=1, help="decides the batches and the initial weights")

    add = parser.add_argument_group("positional encoding").add_argument
    add("--pe", choices=PE, default=defaults.pe, help="which one")
    add("--rope_base", type=amount, default=defaults.rope_base, help="base of theta_j = base^(-2j/d)")
    add("--prope_fraction", type=cli.number(float, 0, 1), default=defaults.prope_fraction,
        help="prope: fraction of the pairs that turns")
    add("--hope_cutoff", type=amount, default=defaults.hope_cutoff,
        help="hope: turns inside the trained context that a pair needs to be kept")

    add = parser.add_argument_group("network").add_argument
    add("--block_size", type=cli.number(int, 2), default=defaults.block_size, help="trained context in tokens, L")
    add("--n_layer", type=count, default=defaults.n_layer, help="blocks")
    add("--n_head", type=count, default=defaults.n_head, help="attention heads a block")
    add("--n_embd", type=count, default=defaults.n_embd, help="channels")
    add("--dropout", type=share, default=defaults.dropout, help="0.1 to 0.2 where a small text is read many times")
    add("--bias", action=argparse.BooleanOptionalAction, default=defaults.bias,
        help="biases in linear layers and norms, as in GPT-2")

    add = parser.add_argument_group("optimization").add_argument
    add("--max_iters", type=count, default=600, help="steps")
    add("--batch_size", type=count, default=32, help="windows of block_size tokens a forward")
    add("--gradient_accumulation_steps", type=count, default=1,
        help="forwards a step, over all processes: large batches in little memory")
    add("--learning_rate", type=amount, default=2e-3, help="the highest, after warm-up")
    add("--min_lr", type=amount, default=2e-4, help="the last")
    add("--warmup_iters", type=cli.number(int, 0), default=50, help="steps from 0 to learning_rate")
    add("--lr_decay_iters", type=count, help="steps until min_lr; the first max_iters if not given")
    add("--weight_decay", type=amount, default=0.1, help="AdamW's, on matrices")
    add("--beta1", type=share, default=0.9, help="AdamW's")
    add("--beta2", type=share, default=0.99, help="AdamW's")
    add("--grad_clip", type=amount, default=1.0, help="largest norm of the gradient; 0: no limit")

    add = parser.add_argument_group("evaluating and saving").add_argument
    add("--eval_interval", type=count, default=100, help="steps between evaluations; each saves a checkpoint")
    add("--eval_iters", type=count, default=20, help="batches of validation text")
    add("--save_interval", type=count, help="steps between checkpoints, if more are wanted")
    add("--save_minutes", type=amount, default=10.0, help="minutes after which one is saved in any case")
    add("--keep_every", type=count, help="keep the weights of each N-th step, as ckpt_00000N.pt")

    cli.add_device_arguments(parser)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="torch.compile: the first step takes a minute, the others less time; if not given, on "
                             "where Triton can make kernels for the GPU")
    return parser


# What a resumed run may change: where it runs, how far it goes and what it saves, nothing that it computes (but for
# the rounding of another device).
FREE_ON_RESUME = {"resume", "out_dir", "dataset", "max_iters", "device", "compile", "save_interval", "save_minutes",
                  "keep_every"}


def parse(argv):
    """-> flags, and the checkpoint to resume from or None. Raises ValueError where flags contradict the checkpoint."""
    parser = make_parser()
    args = parser.parse_args(argv)
    out_dir = Path(args.out_dir)
    if not args.resume:
        if any(out_dir.glob("*.pt")):
            raise ValueError(f"{out_dir} holds a run: add --resume to go on with it, or name another --out_dir")
        args.lr_decay_iters = args.lr_decay_iters or args.max_iters  # kept: a max_iters that grows does not move it
        return args, None
    checkpoint = load_checkpoint(out_dir / "ckpt.pt")
    if "optimizer" not in checkpoint:
        raise ValueError(f"{out_dir}/ckpt.pt holds weights only, which can be scored and sampled but not trained on: "
                         "start anew in another --out_dir")
    parser.set_defaults(**checkpoint["args"])             # a flag that is not given now is as it was
    args = parser.parse_args(argv)
    changed = [f"--{name} was {was} and is now {getattr(args, name)}" for name, was in checkpoint["args"].items()
               if name not in FREE_ON_RESUME and getattr(args, name) != was]
    if changed:
        raise ValueError(f"{out_dir} cannot go on with other flags: {'; '.join(changed)}: leave them out or start "
                         "anew in another --out_dir")
    if args.max_iters < checkpoint["iter"]:
        raise ValueError(f"{out_dir} has done {checkpoint['iter']} steps, more than --max_iters {args.max_iters}")
    return args, checkpoint


def describe(model, args, meta, ids, device, dtype, compiled):
    """Say what is about to happen, so that a wrong flag is seen now and not in the morning."""
    config, pe = model.config, model.transformer.wpe
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"network   {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}: "
          f"{size / 1e6:.2f} M parameters")
    print(f"encoding  {config.pe}, trained context L = {config.block_size} tokens")
    if isinstance(pe, RoPE):
        n_pairs, wavelengths = config.n_embd // config.n_head // 2, (2 * math.pi / pe.theta).tolist()
        print(f"          {len(wavelengths)} of {n_pairs} pairs of channels turn in each head; tokens a turn: "
              + " ".join(f"{tokens:,.{int(tokens < 20)}f}" for tokens in wavelengths))
    print(f"text      {args.dataset}: {len(ids['train']):,} tokens to train on, {len(ids['val']):,} to validate on; "
          f"sha256 {meta['sha256'][:16]}")
    tokens = args.batch_size * args.gradient_accumulation_steps * args.block_size
    total = tokens * args.max_iters
    print(f"training  {args.max_iters:,} steps of {tokens:,} tokens: {total / 1e6:.1f} M, "
          f"{total / len(ids['train']):.2g} x the text")
    print(f"where     {cli.device_name(device)}, {str(dtype).removeprefix('torch.')}, seed {args.seed}"
          + ", compiled: the first step takes a minute" * compiled)


def check_health(loss, grad_norm, lr, step, saved_step, config, scaler, out_dir):
    """Raise RuntimeError where the run has diverged, before bad weights take the place of a good checkpoint."""
    healthy = math.isfinite(loss) and loss < 3 * math.log(config.vocab_size)  # a blind guess costs ln V
    if healthy and (scaler.is_enabled() or math.isfinite(grad_norm)):  # the scaler leaves steps out that overflow
        return
    raise RuntimeError(f"training has diverged: loss {loss:.4g}, gradient norm {grad_norm:.4g} at step {step:,}, "
                       f"learning rate {lr:.3g}. {out_dir}/ckpt.pt still holds step {saved_step:,}; start anew in "
                       "another --out_dir with a lower --learning_rate, more --warmup_iters or a lower --grad_clip")


def main(argv=None):
    args, checkpoint = parse(argv)
    device = cli.pick_device(args.device)
    rank, n_processes = join_processes(device)
    dtype = cli.pick_dtype(args.dtype, device, training_width=args.n_embd)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")        # TF32: float32 products with 10 bits, several times faster
    meta, ids = open_dataset(args.dataset)
    ids = {name: token_tensor(part, device) for name, part in ids.items()}
    for name, part in ids.items():
        if len(part) <= args.block_size:
            raise ValueError(f"{args.dataset}/{name}.bin has {len(part)} tokens and a window needs block_size + 1 = "
                             f"{args.block_size + 1}: use more text or a smaller --block_size")
    if args.gradient_accumulation_steps % n_processes:
        raise ValueError(f"{n_processes} processes cannot share --gradient_accumulation_steps "
                         f"{args.gradient_accumulation_steps} evenly: make it a multiple of {n_processes}")
    if checkpoint and (checkpoint["dataset"]["sha256"], checkpoint["tokenizer"]) != (meta["sha256"], meta["tokenizer"]):
        raise ValueError(f"{args.dataset} is not what {args.out_dir} was trained on: another sha256 or tokenizer")
    flags = {field.name: getattr(args, field.name) for field in fields(GPTConfig) if field.name in args}
    config = GPTConfig(vocab_size=meta["vocab_size"], **flags)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    try:
        guard = cli.lock(out_dir / "log.jsonl", wait=False) if rank == 0 else None
    except BlockingIOError as error:
        raise ValueError(f"another process is training in {out_dir}: name another --out_dir") from error
    try:
        train(args, config, checkpoint, meta, ids, device, dtype, rank, n_processes)
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise RuntimeError("torch.compile failed; go on without it: python train.py --resume --no-compile "
                               f"--out_dir {args.out_dir}. {error}") from error
        scarce = ("out of memory", "not enough memory", "allocate memory")  # CUDA's and the CPU's words for it
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in scarce):
            raise
        gigabytes = memory_estimate(config, args, dtype) / 1e9
        raise RuntimeError(f"out of memory on {cli.device_name(device)}; these flags need about {gigabytes:.1f} GB: "
                           "halve --batch_size and double --gradient_accumulation_steps for the same steps in half the "
                           "memory, or lower --block_size, --n_layer or --n_embd") from error
    finally:
        if guard:
            guard.close()
        if n_processes > 1:
            distributed.destroy_process_group()


def train(args, config, checkpoint, meta, ids, device, dtype, rank, n_processes):
    """The run itself. The process of rank 0 alone evaluates, writes and prints."""
    autocast = cli.autocast(device, dtype)
    torch.manual_seed(args.seed)
    model = GPT(config).to(device)
    optimizer = make_optimizer(model, args, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # small float16 gradients would be zero
    torch.manual_seed(args.seed + rank)                   # again: dropout must not depend on what an encoding drew
    progress = Progress()
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                          # empty where the run began in another number format
            scaler.load_state_dict(checkpoint["scaler"])
        set_rng_state(checkpoint["rng"], device)
        progress = Progress(**{field.name: checkpoint[field.name] for field in fields(Progress)})
    compiled = cli.pick_compile(args.compile, device)
    fast_model = torch.compile(model) if compiled else model  # the same weights, under the same names in `model`
    if n_processes > 1:
        fast_model = DistributedDataParallel(fast_model)

    out_dir = Path(args.out_dir)
    log_file = out_dir / "log.jsonl"
    if rank == 0:
        cut_log(log_file, progress.logged)
        describe(model, args, meta, ids, device, dtype, compiled)
        if checkpoint:
            print(f"resuming  after step {progress.iter:,}")

    # Ctrl-C and SIGTERM ask for a stop; the step under way is finished first. A second one does not wait.
    signals = []

    def ask_to_stop(number, frame):
        if signals:
            raise KeyboardInterrupt
        signals.append(number)

    old_handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}

    ending = False                                        # set below, for what is saved last

    def keep(write, *arguments):
        """Write to the disk -> whether it worked. Where not, a run before its end goes on: there may be room later."""
        try:
            write(*arguments)
        except OSError as error:
            if ending:
                raise
            tqdm.write(f"warning: {error}; training goes on")
            return False
        return True

    def save_run(name, **more):
        return keep(save, out_dir / name, {
            "config": asdict(config), "model": model.state_dict(), "tokenizer": meta["tokenizer"], "args": vars(args),
            "dataset": {"path": args.dataset, "sha256": meta["sha256"]}, **asdict(progress), **more})

    def save_latest():
        progress.seconds = time.time() - started
        return save_run("ckpt.pt", optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                        rng=get_rng_state(device))

    def log(line):
        with open(log_file, "a") as file:
            file.write(json.dumps(line) + "\n")

    tokens_per_step = args.batch_size * args.gradient_accumulation_steps * args.block_size
    turns = range(rank, args.gradient_accumulation_steps, n_processes)  # the forwards of a step that are ours
    started = time.time() - progress.seconds
    saved_step, saved_time = progress.iter, time.time()
    lr = train_loss = grad_norm = None                    # of the last step
    stopping, shown = False, {}
    # closed on any exit, so that an error stands on a line of its own
    with tqdm(total=args.max_iters, initial=progress.iter, unit="step", dynamic_ncols=True, disable=rank > 0) as bar:
        model.train()
        while True:
            step = progress.iter
            ending = stopping or step >= args.max_iters
            evaluating = (step % args.eval_interval == 0 or step == args.max_iters) and step != progress.logged
            saving = evaluating or step > saved_step and (
                ending or (args.save_interval and step % args.save_interval == 0)
                or time.time() - saved_time > 60 * args.save_minutes)
            if train_loss is not None and (step % 10 == 0 or saving):  # reading a loss makes a GPU wait: not each time
                check_health(train_loss.item(), grad_norm.item(), lr, step, saved_step, config, scaler, out_dir)
                rate = (bar.format_dict["rate"] or 0) * tokens_per_step
                bar.set_postfix(loss=f"{train_loss.item():.3f}", **shown, tokens_per_s=f"{rate:,.0f}", refresh=False)
            if rank == 0 and evaluating:
                val_loss = validation_loss(model, ids["val"], args.batch_size, args.block_size, args.eval_iters, device,
                                           autocast)
                line = {"iter": step, "tokens": step * tokens_per_step, "seconds": round(time.time() - started, 2),
                        "val_loss": val_loss}
                if train_loss is not None:                # before the first step there is none
                    line |= {"train_loss": train_loss.item(), "grad_norm": grad_norm.item(), "lr": lr}
                keep(log, line)
                progress.logged, shown["val"] = step, f"{val_loss:.3f}"
                if val_loss < progress.best_val_loss and save_run("best.pt", val_loss=val_loss, best_val_loss=val_loss):
                    progress.best_val_loss = val_loss     # that of the best.pt which is really there
            if rank == 0 and args.keep_every and step % args.keep_every == 0:
                save_run(f"ckpt_{step:06d}.pt")
            if rank == 0 and saving:
                saved_step = step if save_latest() else saved_step
                saved_time = time.time()                  # in any case: a full disk is not tried at every step
            if ending:
                break

            lr = learning_rate_at(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train_loss = torch.zeros((), device=device)
            for i in turns:
                index = step * args.gradient_accumulation_steps + i
                x, y = training_batch(ids["train"], args.batch_size, args.block_size, args.seed, index, device)
                if n_processes > 1:
                    fast_model.require_backward_grad_sync = i == turns[-1]  # once a step is enough
                with autocast:
                    loss = fast_model(x, y)[1] / len(turns)   # their sum: the mean over one large batch
                scaler.scale(loss).backward()
                train_loss += loss.detach()
            scaler.unscale_(optimizer)                    # before clipping, which is meant for the true gradient
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            progress.iter += 1
            bar.update()
            stopping = bool(signals)
            if n_processes > 1:                           # all stop at the same step, and report the mean loss
                shared = torch.stack((train_loss, torch.full((), float(stopping), device=device)))
                distributed.all_reduce(shared)
                train_loss = shared[0] / n_processes
                stopping = progress.iter % 10 == 0 and shared[1].item() > 0  # reading it makes a GPU wait
    for number, handler in old_handlers.items():
        signal.signal(number, handler)
    if n_processes > 1:
        distributed.barrier()                             # nobody leaves before the first process has saved
    if rank > 0:
        return
    if progress.iter < args.max_iters:
        print(f"stopped after step {progress.iter:,}, all is kept; "
              f"go on with: python train.py --resume --out_dir {out_dir}")
        # not done: what waits for the result must not go on; the signal may have gone to another process
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    print(f"lowest validation loss {progress.best_val_loss:.4f} nats a token; {progress.seconds / 60:.1f} minutes; "
          f"kept in {out_dir}")
    print(f"score it beyond the trained context:  python eval_extrapolation.py {out_dir}")
    print(f"read what it writes:                  python sample.py --out_dir {out_dir}")


if __name__ == "__main__":
    cli.run(main)
