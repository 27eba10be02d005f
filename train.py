"""
Train a GPT on a CPU, a GPU or several:

    python train.py                         HoPE on the default text; to see what it is good for, @config/cpu_demo
    python train.py @config/cpu_demo --pe rope --out_dir out/rope
    python train.py --resume --out_dir out/rope                 continue an interrupted run
    torchrun --nproc_per_node=4 train.py @config/cpu_demo --gradient_accumulation_steps 4

Runs with the same --seed see the same batches and start from the same shared weights, whatever their encoding. A run
leaves in OUT_DIR: ckpt.pt (the latest state, all that --resume needs), best.pt (the weights with the lowest validation
loss) and log.jsonl (a line per evaluation and per --log_interval). To read the code, start with train() and Run.step().
"""
from common import flags  # first: see common/__init__.py

# isort: split

import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.checkpoint import (
    append_log,
    copy_matching_weights,
    cut_log,
    exclusive,
    load_checkpoint,
    missing,
    save_checkpoint,
)
from common.device import (
    Device,
    DeviceConfig,
    check_computation,
    explain_failures,
    memory_estimate,
    pick_compile,
    stop_signals,
)
from common.optimizer import OptimizerConfig, make_optimizer, set_learning_rate
from data import nanogpt
from data.loader import DEFAULT_DATASET, open_to_train, token_tensor, training_batch, validation_batches
from data.prepare import dataset_path
from model import GPT, ROTARY, GPTConfig, setting


@dataclass
class TrainConfig(OptimizerConfig, DeviceConfig):
    """What defines a run, besides the network. Each field is a flag."""

    dataset: str = setting(DEFAULT_DATASET, "folder made by data.prepare; the default one is made automatically")
    out_dir: str = setting("out/default", "folder for checkpoints and log")
    resume: bool = setting(False, "continue from out_dir/ckpt.pt, with the flags stored there")
    init_from: str | None = setting(None, "start from the weights of a run's folder or checkpoint (nanoGPT's too), "
                                    "with a new schedule; --pe, --block_size and others may differ")
    seed: int = setting(1, "determines the batches and the initial weights", at_least=0, at_most=2**32)
    max_iters: int = setting(600, "optimizer steps", at_least=1)
    batch_size: int = setting(32, "windows of block_size tokens per micro-batch", at_least=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches per step, over all processes: large batches in "
                                               "little memory", at_least=1)
    grad_clip: float = setting(1.0, "largest norm of the gradient; 0: no limit", at_least=0)
    eval_interval: int = setting(100, "steps between evaluations; each saves a checkpoint", at_least=1)
    eval_iters: int = setting(20, "batches of validation text per evaluation", at_least=1)
    log_interval: int | None = setting(None, "steps between lines of log.jsonl with the mean training loss; default: "
                                       "eval_interval", at_least=1)
    save_interval: int | None = setting(None, "steps between additional checkpoints", at_least=1)
    save_minutes: float = setting(10.0, "minutes after which a checkpoint is saved in any case", at_least=0)
    keep_every: int | None = setting(None, "keep the weights of every N-th step, as ckpt_00000N.pt", at_least=1)
    compile: bool | None = setting(None, "torch.compile: the first step takes a minute, the others less time; default: "
                                   "on cuda for 1,000 steps or more at width 256 or more, if it works there")

    def __post_init__(self):
        super().__post_init__()
        self.lr_decay_iters = self.lr_decay_iters or self.max_iters  # stored: it stays if max_iters grows
        self.log_interval = self.log_interval or self.eval_interval


# The vocabulary comes with the text; attn_scaling is for evaluation and sampling.
NETWORK_FLAGS = [field.name for field in fields(GPTConfig) if field.name not in ("vocab_size", "attn_scaling")]
# What a resumed run may change: where it runs, how far it goes, what it measures and saves, but not what it computes.
FREE_ON_RESUME = {"resume", "out_dir", "dataset", "max_iters", "device", "compile", "eval_interval", "eval_iters",
                  "log_interval", "save_interval", "save_minutes", "keep_every"}


def train(run, signals, bar):
    """The loop -> whether a signal stopped it before max_iters. Several processes take the same decisions."""
    config = run.config
    while True:
        ending = run.device.any(bool(signals), run.iter) or run.iter >= config.max_iters
        evaluating = run.evaluation_is_due()
        if evaluating or run.is_due(config.log_interval):
            run.log(run.evaluate() if evaluating else {})
        if evaluating or (ending and run.iter > run.first) or run.save_is_due():
            run.save()
        if run.is_due(config.keep_every):
            run.keep()
        if ending:
            return run.iter < config.max_iters
        run.step()
        run.show_progress(bar)


class Run:
    """One training run: model, optimizer, progress, and the files in out_dir.

    Every process has one; that of rank 0 evaluates, writes and prints."""

    def __init__(self, network, config, meta, ids, device):
        self.config, self.meta, self.ids, self.device = config, meta, ids, device
        torch.manual_seed(config.seed)
        self.model = GPT(network).to(device.torch_device)
        self.optimizer = make_optimizer(self.model, config, device.torch_device, device.dtype)
        # Small gradients would be zero in float16, so the scaler multiplies the loss.
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.dtype == torch.float16)
        torch.manual_seed(config.seed + device.rank)  # again: encodings draw different numbers of initial values
        self.compiled = pick_compile(config.compile, device.torch_device, network.n_embd, config.max_iters)
        self.compiled_model = torch.compile(self.model) if self.compiled else self.model
        if device.n_processes > 1:
            self.compiled_model = DistributedDataParallel(self.compiled_model)
        self.model.train()
        self.tokens_per_step = config.batch_size * config.gradient_accumulation_steps * network.block_size
        self.iter = self.first = 0  # steps done: now, and when this session started
        self.saved = 0  # the step in ckpt.pt
        self.evaluated = -1  # the step of the last evaluation
        self.best_val_loss = math.inf  # nats per token, of best.pt
        self.started = self.saved_at = time.time()
        self.val_loss = self.train_loss = self.grad_norm = self.lr = None  # the latest
        self.loss_sum, self.loss_count = torch.zeros((), device=device.torch_device), 0  # since the last log line
        self.overflows = self.overflows_in_a_row = 0  # steps in which the gradient overflowed in float16
        self.write_error = None  # of this step

    def step(self):
        """One optimizer step on gradient_accumulation_steps micro-batches."""
        config, device = self.config, self.device
        self.lr = set_learning_rate(self.optimizer, self.iter, config)
        micro_batches = range(device.rank, config.gradient_accumulation_steps, device.n_processes)  # this rank's
        train_loss = torch.zeros((), device=device.torch_device)
        for i in micro_batches:
            index = self.iter * config.gradient_accumulation_steps + i
            x, y = training_batch(self.ids["train"], config.batch_size, self.model.config.block_size, config.seed,
                                  index, device.torch_device)
            if device.n_processes > 1:
                self.compiled_model.require_backward_grad_sync = i == micro_batches[-1]  # once per step
            with device.autocast():
                loss = self.compiled_model(x, y)[1] / len(micro_batches)  # their sum is the mean over the step's batch
            self.scaler.scale(loss).backward()
            train_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)  # clipping applies to the true gradient
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        overflowed = self.scaler.get_scale() < scale  # then the scaler took no step
        self.overflows += overflowed
        self.overflows_in_a_row = overflowed * (self.overflows_in_a_row + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.train_loss = device.mean(train_loss)
        self.loss_sum += self.train_loss
        self.loss_count += 1
        self.write_error = None
        self.iter += 1

    @torch.no_grad()
    def validation_loss(self, n_batches):
        """The mean loss in nats per token on n_batches batches of validation text, the same each time."""
        losses = []
        self.model.eval()
        for x, y in validation_batches(self.ids["val"], self.config.batch_size, self.model.config.block_size,
                                       n_batches, self.device.torch_device):
            with self.device.autocast():
                losses.append(self.model(x, y)[1].item())
        self.model.train()
        return sum(losses) / len(losses)

    def evaluate(self):
        """-> {"val_loss": ...} of the weights as they are now. Writes best.pt if it is the lowest."""
        self.evaluated = self.iter
        if self.device.rank > 0:
            return {}
        self.val_loss = self.validation_loss(self.config.eval_iters)
        if self.val_loss < self.best_val_loss:
            best = {**self.weights(), "val_loss": self.val_loss, "best_val_loss": self.val_loss}
            if self.write(save_checkpoint, "best.pt", best):
                self.best_val_loss = self.val_loss
        return {"val_loss": self.val_loss}

    # ---- when

    def is_due(self, interval):
        """Whether something that happens every `interval` steps (None: never) happens now."""
        return interval is not None and self.iter > self.first and self.iter % interval == 0

    def evaluation_is_due(self):
        last = self.iter == self.config.max_iters
        return self.iter != self.evaluated and (last or self.iter % self.config.eval_interval == 0)

    def save_is_due(self):
        overdue = self.device.rank == 0 and time.time() - self.saved_at > 60 * self.config.save_minutes
        overdue = self.device.any(overdue, self.iter)
        return self.is_due(self.config.save_interval) or (overdue and self.iter > self.first)

    # ---- files and the terminal

    def log(self, measured):
        """Write a line of log.jsonl. train_loss is the mean since the line before."""
        line = {"iter": self.iter, "tokens": self.iter * self.tokens_per_step,
                "seconds": round(time.time() - self.started, 2), **measured}
        if self.loss_count:  # there is none before the first step
            line["train_loss"] = self.loss_sum.item() / self.loss_count
        if self.grad_norm is not None:  # nor these before the first one of a resumed run
            line |= {"grad_norm": self.grad_norm.item(), "lr": self.lr}
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        self.write(append_log, "log.jsonl", line)
        if self.device.rank == 0 and not (sys.stdout.isatty() and sys.stderr.isatty()):  # else the bar shows them
            losses = ", ".join(f"{name} {line[name]:.4f}" for name in ("train_loss", "val_loss") if name in line)
            say(f"step {self.iter:,} of {self.config.max_iters:,}, {line['seconds']:,.0f} s: {losses}")

    def show_progress(self, bar):
        """Losses and speed in the progress bar, every tenth step: reading the loss makes a GPU wait."""
        bar.update()
        if self.iter % 10 == 0:
            self.check_health()
            val = {} if self.val_loss is None else {"val": f"{self.val_loss:.3f}"}
            rate = (bar.format_dict["rate"] or 0) * self.tokens_per_step
            bar.set_postfix(loss=f"{self.train_loss.item():.3f}", **val, tokens_per_s=f"{rate:,.0f}", refresh=False)

    def check_health(self, saving=False):
        """Raise RuntimeError if the run has diverged. The training loss is that of the weights before the last step;
        what is to be saved is judged by itself, before it replaces a good checkpoint."""
        if self.iter == self.first:
            return
        losses, grad_norm = {"loss": self.train_loss.item()}, self.grad_norm.item()
        if saving and self.device.rank == 0:
            evaluated = self.evaluated == self.iter
            losses["validation loss"] = self.val_loss if evaluated else self.validation_loss(1)
        kept = f"{self.config.out_dir}/ckpt.pt still holds step {self.saved:,}"
        if self.overflows_in_a_row >= 20:
            raise RuntimeError(f"the last {self.overflows_in_a_row} gradients overflowed in float16, and no step was "
                               f"taken: start again in another --out_dir with --dtype float32 or bfloat16; {kept}")
        finite = math.isfinite(grad_norm) or self.scaler.is_enabled()  # the scaler skips overflows
        limit = 3 * math.log(self.model.config.vocab_size)  # a uniform guess costs ln V
        if not (finite and all(loss < limit for loss in losses.values())):
            found = ", ".join(f"{name} {value:.4g}" for name, value in {**losses, "gradient norm": grad_norm}.items())
            raise RuntimeError(
                f"training has diverged: {found} at step {self.iter:,}, learning rate {self.lr:.3g}. {kept}; start "
                "again in another --out_dir with a lower --learning_rate, more --warmup_iters or a lower --grad_clip")

    def weights(self):
        """What evaluation and sampling need, and how far the run is."""
        network = asdict(self.model.config)
        return {"config": network, "model": self.model.state_dict(), "tokenizer": self.meta["tokenizer"],
                "args": {**network, **asdict(self.config)},
                "dataset": {"path": self.config.dataset, "sha256": self.meta["sha256"]},
                "threads": torch.get_num_threads(),  # which the last bits of a CPU's sums depend on
                "iter": self.iter, "best_val_loss": self.best_val_loss, "logged": self.evaluated,
                "seconds": time.time() - self.started}

    def state(self):
        """What --resume needs."""
        return {**self.weights(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": self.device.get_rng_state(), "loss_sum": self.loss_sum, "loss_count": self.loss_count}

    def load(self, state):
        """Continue from what state() returned. Raises ValueError if something is missing there."""
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:  # empty if the run started in another number format
                self.scaler.load_state_dict(state["scaler"])
            self.device.set_rng_state(state["rng"])
            self.best_val_loss, self.evaluated = state["best_val_loss"], state["logged"]
            self.started = time.time() - state["seconds"]  # earlier sessions count
            self.loss_sum += state.get("loss_sum", 0)
        except (LookupError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"ckpt.pt is damaged ({type(error).__name__}): it can be scored and sampled, perhaps, but "
                             "not resumed") from error
        if not Path(self.config.out_dir, "best.pt").exists():
            self.best_val_loss = math.inf  # that of a file
        self.iter = self.first = self.saved = state["iter"]
        self.threads = state.get("threads")
        self.loss_count = state.get("loss_count", 0)

    def save(self):
        self.check_health(saving=True)
        self.saved_at = time.time()  # even if it fails: a full disk is not tried again at every step
        if self.write(save_checkpoint, "ckpt.pt", self.state()):
            self.saved = self.iter

    def keep(self):
        self.check_health(saving=True)
        self.write(save_checkpoint, f"ckpt_{self.iter:06d}.pt", self.weights())

    def write(self, write, name, content):
        """Write a file -> whether that worked. If not, the run continues: there may be space later."""
        if self.device.rank > 0:
            return False
        try:
            write(Path(self.config.out_dir, name), content)
        except OSError as error:
            self.write_error = error
            say(f"warning: {flags.describe(error)}; training continues")
            return False
        return True


def say(text):
    """Print a line above the progress bar, at once."""
    tqdm.write(text)
    sys.stdout.flush()


def describe_network(model):
    """Say how large a GPT is, and which pairs of channels a rotary encoding rotates."""
    config, theta = model.config, getattr(model.transformer.wpe, "theta", None)
    say(f"network   {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}: "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters")
    say(f"encoding  {config.pe}, trained context L = {config.block_size} tokens")
    if config.pe in ROTARY:
        n_pairs = config.n_embd // config.n_head // 2
        same = {0: ": this is NoPE", n_pairs: ": this is RoPE"}.get(len(theta), "") if config.pe != "rope" else ""
        say(f"          {len(theta)} of {n_pairs} pairs of channels rotate in each head{same}; tokens per turn: "
            + " ".join(f"{turn:,.{int(turn < 20)}f}" for turn in (2 * math.pi / theta).tolist()))
    if "S" in config.kinds():
        sees = f"{config.window} tokens" if config.window else "everything"
        say(f"          layers {config.kinds()}: short-window layers (S) have {config.local().pe} and see {sees}")


def describe_run(run, copied=None):
    """Say what is about to happen, so that a wrong flag is noticed before the training."""
    config, n_train, network = run.config, len(run.ids["train"]), run.model.config
    describe_network(run.model)
    changed = {field.name for settings in (network, config) for field in fields(settings)
               if getattr(settings, field.name) != field.default}
    if without_effect := sorted(changed & flags.idle(network, config.optimizer)):
        say(f"note      no effect on this run: {', '.join(f'--{name}' for name in without_effect)}")
    if network.rope_scaling != "none" and network.rope_factor == 1:
        say("note      --rope_scaling scales nothing without a --rope_factor above 1")
    say(f"text      {config.dataset}: {n_train:,} tokens to train on, {len(run.ids['val']):,} to validate on; "
        f"sha256 {run.meta['sha256'][:16]}")
    total = run.tokens_per_step * config.max_iters
    say(f"training  {config.max_iters:,} steps of {run.tokens_per_step:,} tokens: {total:,}, {total / n_train:.1%} of "
        "the text")
    say(f"device    {run.device}, {str(run.device.dtype).removeprefix('torch.')}, seed {config.seed}"
        + ", compiled: the first step takes a minute" * run.compiled)
    memory, free = memory_estimate(network, config.batch_size, run.device.dtype) / 1e9, run.device.free_memory()
    say(f"memory    about {memory:.1f} GB needed" + (f", {free / 1e9:.1f} GB free" if free else ""))
    if copied:
        same, new, left_out = copied
        say(f"weights   {len(same)} tensors from {config.init_from}; new: {', '.join(new) or 'none'}; left out: "
            f"{', '.join(left_out) or 'none'}")
    if run.first:
        say(f"resuming  after step {run.first:,}")
        if config.max_iters > max(run.first, config.lr_decay_iters):
            say(f"note      the schedule ends at step {config.lr_decay_iters:,}, so from there on the learning rate "
                "stays at its minimum")
        if run.device.type == "cpu" and run.threads not in (None, torch.get_num_threads()):
            say(f"note      {run.threads} threads before, {torch.get_num_threads()} now: sums are rounded in another "
                "order, so the last bits will differ from those of an uninterrupted run")


def describe_result(run, stopped):
    """Say how a run has ended and what to do next."""
    out_dir = run.config.out_dir
    if stopped:
        say(f"stopped after step {run.iter:,}, everything is saved; continue with: "
            + flags.command("train.py", "--resume", "--out_dir", out_dir))
        return
    if run.overflows:
        say(f"note: in {run.overflows:,} of {run.iter - run.first:,} steps the gradient overflowed in float16, and the "
            "step was left out")
    say(f"lowest validation loss {run.best_val_loss:.4f} nats per token; {(time.time() - run.started) / 60:.1f} "
        f"minutes; saved in {out_dir}")
    say(f"score it beyond the trained context:  {flags.command('eval_extrapolation.py', out_dir)}")
    say(f"read what it writes:                  {flags.command('sample.py', '--out_dir', out_dir)}")


def parse(argv):
    """-> GPTConfig, TrainConfig, and the checkpoint to resume or to start from, or None.

    Raises ValueError if they do not fit together."""
    parser = flags.ArgumentParser("Train a GPT. Flags can be kept in a file: python train.py @config/cpu_demo",
                                  hints=nanogpt.FLAGS)
    flags.add_flags(parser.add_argument_group("network"), GPTConfig, *NETWORK_FLAGS)
    flags.add_flags(parser.add_argument_group("run"), TrainConfig)
    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        checkpoint = load_checkpoint(Path(args.out_dir, "ckpt.pt"))
        args = parse_resumed(parser, argv, checkpoint)
    else:
        check_free(args.out_dir)
    if args.init_from and not args.resume:
        checkpoint = load_checkpoint(args.init_from)
        was = checkpoint["config"]
        parser.set_defaults(**{name: was[name] for name in NETWORK_FLAGS})
        args = parser.parse_args(argv)
        if args.rope_scaling not in ("none", was["rope_scaling"]) and not args.rope_context:
            args.rope_context = was["block_size"]  # a new scaling starts from the context of the checkpoint
    network = GPTConfig(**{name: getattr(args, name) for name in NETWORK_FLAGS})
    config = TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)})
    path = Path(os.path.abspath(dataset_path(config.dataset)))  # to be found from any folder, with a moved project, too
    config.dataset = str(path.relative_to(flags.PROJECT) if path.is_relative_to(flags.PROJECT) else path)
    return network, config, checkpoint


def check_free(out_dir):
    """Raise ValueError if a folder holds weights that a new run would replace. Those of step 0 hold nothing yet."""
    files = {path.name for path in Path(out_dir).glob("*.pt")}
    if "ckpt.pt" in files:
        raise ValueError(f"{out_dir} holds a run: add --resume to continue it, or choose another --out_dir")
    if files - {"best.pt"} or (files and load_checkpoint(out_dir)["iter"]):
        raise ValueError(f"{missing(Path(out_dir, 'ckpt.pt'))}, or delete this folder")


def parse_resumed(parser, argv, checkpoint):
    """Parse argv with the flags of the run in a checkpoint as defaults.

    Raises ValueError if a flag that is not in FREE_ON_RESUME has changed."""
    if not checkpoint["dataset"] or "optimizer" not in checkpoint:
        raise ValueError("ckpt.pt holds weights only, which can be scored, sampled and named by --init_from, but not "
                         "resumed")
    stored = {"optimizer": "adamw", **checkpoint["args"]}  # older checkpoints were all trained with it
    parser.set_defaults(**stored)
    args = parser.parse_args(argv)
    changed = [f"--{name} was {stored[name]} and is now {value}" for name, value in vars(args).items()
               if name in stored and name not in FREE_ON_RESUME and stored[name] != value]
    if changed:
        raise ValueError(f"a run cannot be resumed with other flags: {'; '.join(changed)}: leave them out or start "
                         "again in another --out_dir")
    if args.max_iters < checkpoint["iter"]:
        raise ValueError(f"{args.out_dir} has done {checkpoint['iter']} steps, more than --max_iters {args.max_iters}")
    return args


def main(argv=None):
    network, config, checkpoint = parse(argv)
    device = Device(config, training_width=network.n_embd)
    with device.processes(config.gradient_accumulation_steps):
        meta, ids = open_to_train(config.dataset, network.block_size, checkpoint, config.resume)
        ids = {name: token_tensor(part, device.torch_device) for name, part in ids.items()}
        # A checkpoint's vocabulary can be larger than its tokenizer's: nanoGPT pads it.
        known = checkpoint["config"] if checkpoint else meta
        network = replace(network, vocab_size=known["vocab_size"])
        with exclusive(config.out_dir, device.rank), explain_failures(network, config, device):
            run, copied = Run(network, config, meta, ids, device), None
            if config.resume:
                run.load(checkpoint)
            elif checkpoint:
                copied = copy_matching_weights(run.model, checkpoint)
            check_computation(run.model, device)
            if device.rank == 0:
                cut_log(Path(config.out_dir, "log.jsonl"), run.iter if config.resume else -1)
                describe_run(run, copied)
            with stop_signals() as signals, tqdm(
                    total=config.max_iters, initial=run.iter, unit="step", dynamic_ncols=True,
                    disable=device.rank > 0 or not sys.stderr.isatty()) as bar:
                stopped = train(run, signals, bar)
            run.compiled_model = None  # freed after the process group, DDP can deadlock
    if run.write_error:
        raise run.write_error
    if device.rank == 0:
        describe_result(run, stopped)
    if stopped:
        sys.exit(128 + (signals or [15])[0])  # as if killed by the signal (15: another rank received it)


if __name__ == "__main__":
    flags.run(main)
