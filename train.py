"""
Train a GPT on a CPU, a GPU or several:

    python train.py                                             HoPE on the default text
    python train.py @config/cpu_demo --pe rope --out_dir out/rope
    python train.py --resume --out_dir out/rope                 continue an interrupted run
    torchrun --nproc_per_node=4 train.py @config/cpu_demo --gradient_accumulation_steps 4

Runs with the same --seed see the same batches and start from the same shared weights, whatever their encoding. A run
leaves in OUT_DIR: ckpt.pt (the latest state, all that --resume needs), best.pt (the weights with the lowest validation
loss) and log.jsonl (one line per evaluation). To read the code, start with train() and Run.step().
"""
import math
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common import flags
from common.checkpoint import append_log, cut_log, exclusive, init_weights, load_checkpoint, save_checkpoint
from common.device import DeviceConfig, Place, explained_failures, pick_compile, stop_signals
from common.optimizer import OptimizerConfig, make_optimizer, set_learning_rate
from common.report import describe_result, describe_run, show_progress
from data.loader import DEFAULT_DATASET, open_to_train, token_tensor, training_batch, validation_batches
from model import GPT, GPTConfig, knob


@dataclass
class TrainConfig(OptimizerConfig, DeviceConfig):
    """What defines a run, besides the network. Each field is a flag."""

    dataset: str = knob(DEFAULT_DATASET, "folder made by data.prepare; the default one is made automatically")
    out_dir: str = knob("out/default", "folder for checkpoints and log")
    resume: bool = knob(False, "continue from out_dir/ckpt.pt, with the flags stored there")
    init_from: str | None = knob(None, "start from the weights of a run's folder or checkpoint (nanoGPT's too), with a "
                                 "new schedule; --pe, --block_size and others may differ")
    seed: int = knob(1, "determines the batches and the initial weights", at_least=0, at_most=2**32)
    max_iters: int = knob(600, "optimizer steps", at_least=1)
    batch_size: int = knob(32, "windows of block_size tokens per micro-batch", at_least=1)
    gradient_accumulation_steps: int = knob(1, "micro-batches per step, over all processes: large batches in little "
                                            "memory", at_least=1)
    grad_clip: float = knob(1.0, "largest norm of the gradient; 0: no limit", at_least=0)
    eval_interval: int = knob(100, "steps between evaluations; each saves a checkpoint", at_least=1)
    eval_iters: int = knob(20, "batches of validation text per evaluation", at_least=1)
    log_interval: int | None = knob(None, "steps between lines of log.jsonl with the mean training loss; default: "
                                    "eval_interval", at_least=1)
    save_interval: int | None = knob(None, "steps between additional checkpoints", at_least=1)
    save_minutes: float = knob(10.0, "minutes after which a checkpoint is saved in any case", at_least=0)
    keep_every: int | None = knob(None, "keep the weights of every N-th step, as ckpt_00000N.pt", at_least=1)
    compile: bool | None = knob(None, "torch.compile: the first step takes a minute, the others less time; default: "
                                "on if Triton can build kernels for the GPU")

    def __post_init__(self):
        super().__post_init__()
        self.lr_decay_iters = self.lr_decay_iters or self.max_iters  # stored: it stays if max_iters grows
        self.log_interval = self.log_interval or self.eval_interval


# The vocabulary comes with the text; attn_scaling is for evaluation and sampling.
NETWORK_FLAGS = [knob.name for knob in fields(GPTConfig) if knob.name not in ("vocab_size", "attn_scaling")]
# What a resumed run may change: where it runs, how far it goes, what it measures and saves, but not what it computes.
FREE_ON_RESUME = {"resume", "out_dir", "dataset", "max_iters", "device", "compile", "eval_interval", "eval_iters",
                  "log_interval", "save_interval", "save_minutes", "keep_every"}


def due(step, interval):
    """Whether something that happens every `interval` steps (None: never) happens at this step."""
    return interval is not None and step % interval == 0


def say(text):
    """Print a line. If nobody reads it, or the disk it goes to is full, training continues all the same."""
    with suppress(OSError):
        tqdm.write(text)
        sys.stdout.flush()


def train(run, signals, bar):
    """The loop -> whether a signal stopped it before max_iters.

    With several processes all must take the same decisions. They decide from the step alone; on the clock and on
    signals they agree every tenth step, because that makes a GPU wait.
    """
    config, place, first, stopping = run.config, run.place, run.iter, False
    while True:
        step, overdue = run.iter, False
        if place.n_processes == 1 or step % 10 == 0:
            stopping, overdue = place.any(bool(signals)), place.any(run.save_is_overdue())
        ending = stopping or step >= config.max_iters
        evaluating = step != run.evaluated and (due(step, config.eval_interval) or step == config.max_iters)
        logging = evaluating or (step > first and due(step, config.log_interval))
        saving = evaluating or (step > first and (ending or overdue or due(step, config.save_interval)))
        keeping = step > first and due(step, config.keep_every)
        if saving or keeping or step % 10 == 0:  # reading the loss makes a GPU wait
            run.check_health()
            show_progress(run, bar)
        if logging:
            run.log(run.evaluate() if evaluating else {})
        if saving:
            run.save()
        if keeping:
            run.write(save_checkpoint, f"ckpt_{step:06d}.pt", run.weights())
        if ending:
            return stopping and step < config.max_iters
        run.step()
        bar.update()


class Run:
    """One training run: model, optimizer, progress, and the files in out_dir.

    Every process has one; that of rank 0 evaluates, writes and prints.
    """

    def __init__(self, network, config, meta, ids, place):
        self.config, self.meta, self.ids, self.place = config, meta, ids, place
        torch.manual_seed(config.seed)
        self.model = GPT(network).to(place.device)
        self.optimizer = make_optimizer(self.model, config, place.device, place.dtype)
        # Small gradients would be zero in float16, so the scaler multiplies the loss.
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=place.dtype == torch.float16)
        torch.manual_seed(config.seed + place.rank)  # again: encodings draw different numbers of initial values
        self.compiled = pick_compile(config.compile, place.device)
        self.fast_model = torch.compile(self.model) if self.compiled else self.model
        if place.n_processes > 1:
            self.fast_model = DistributedDataParallel(self.fast_model)
        self.model.train()
        self.tokens_per_step = config.batch_size * config.gradient_accumulation_steps * network.block_size
        self.iter = 0  # steps done
        self.saved = 0  # the step in ckpt.pt
        self.evaluated = -1  # the step of the last evaluation
        self.best_val_loss = math.inf  # nats per token, of best.pt
        self.started = self.saved_at = time.time()
        self.val_loss = self.train_loss = self.grad_norm = self.lr = None  # the latest
        self.loss_sum, self.loss_count = torch.zeros((), device=place.device), 0  # since the last line of the log
        self.write_error = None  # of this step

    def step(self):
        """One optimizer step on gradient_accumulation_steps micro-batches."""
        config, place = self.config, self.place
        self.lr = set_learning_rate(self.optimizer, self.iter, config)
        micro_batches = range(place.rank, config.gradient_accumulation_steps, place.n_processes)  # this rank's
        train_loss = torch.zeros((), device=place.device)
        for i in micro_batches:
            index = self.iter * config.gradient_accumulation_steps + i
            x, y = training_batch(self.ids["train"], config.batch_size, self.model.config.block_size, config.seed,
                                  index, place.device)
            if place.n_processes > 1:
                self.fast_model.require_backward_grad_sync = i == micro_batches[-1]  # once per step
            with place.autocast():
                loss = self.fast_model(x, y)[1] / len(micro_batches)  # their sum is the mean over the step's batch
            self.scaler.scale(loss).backward()
            train_loss += loss.detach()
        self.scaler.unscale_(self.optimizer)  # clipping applies to the true gradient
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.train_loss = place.mean(train_loss)
        self.loss_sum += self.train_loss
        self.loss_count += 1
        self.write_error = None
        self.iter += 1

    @torch.no_grad()
    def evaluate(self):
        """Loss on the same validation tokens each time -> {"val_loss": ...}. Writes best.pt if it is the lowest."""
        self.evaluated = self.iter
        if self.place.rank > 0:
            return {}
        config = self.config
        self.model.eval()
        losses = []
        for x, y in validation_batches(self.ids["val"], config.batch_size, self.model.config.block_size,
                                       config.eval_iters, self.place.device):
            with self.place.autocast():
                losses.append(self.model(x, y)[1].item())
        self.model.train()
        self.val_loss = sum(losses) / len(losses)
        if self.val_loss < self.best_val_loss:
            best = {**self.weights(), "val_loss": self.val_loss, "best_val_loss": self.val_loss}
            if self.write(save_checkpoint, "best.pt", best):
                self.best_val_loss = self.val_loss
        return {"val_loss": self.val_loss}

    def log(self, measured):
        """Write a line of log.jsonl. train_loss is the mean since the line before."""
        line = {"iter": self.iter, "tokens": self.iter * self.tokens_per_step,
                "seconds": round(time.time() - self.started, 2), **measured}
        if self.loss_count:  # there is none before the first step
            line |= {"train_loss": self.loss_sum.item() / self.loss_count, "grad_norm": self.grad_norm.item(),
                     "lr": self.lr}
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        self.write(append_log, "log.jsonl", line)
        if self.place.rank == 0 and not (sys.stdout.isatty() and sys.stderr.isatty()):  # else the bar shows them
            say(", ".join(f"{name} {value:.6g}" for name, value in line.items()))

    def weights(self):
        """What evaluation and sampling need, and how far the run is."""
        network = asdict(self.model.config)
        return {"config": network, "model": self.model.state_dict(), "tokenizer": self.meta["tokenizer"],
                "args": {**network, **asdict(self.config)},
                "dataset": {"path": self.config.dataset, "sha256": self.meta["sha256"]},
                "iter": self.iter, "best_val_loss": self.best_val_loss, "logged": self.evaluated,
                "seconds": time.time() - self.started}

    def state(self):
        """What --resume needs."""
        return {**self.weights(), "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "rng": self.place.get_rng_state(), "loss_sum": self.loss_sum, "loss_count": self.loss_count}

    def load(self, state):
        """Continue from what state() returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty if the run started in another number format
            self.scaler.load_state_dict(state["scaler"])
        self.place.set_rng_state(state["rng"])
        self.iter = self.saved = state["iter"]
        self.best_val_loss, self.evaluated = state["best_val_loss"], state["logged"]
        self.started = time.time() - state["seconds"]  # earlier sessions count
        self.loss_sum += state.get("loss_sum", 0)
        self.loss_count = state.get("loss_count", 0)

    def save(self):
        self.saved_at = time.time()  # even if it fails: a full disk is not tried again at every step
        if self.write(save_checkpoint, "ckpt.pt", self.state()):
            self.saved = self.iter

    def save_is_overdue(self):
        return self.place.rank == 0 and time.time() - self.saved_at > 60 * self.config.save_minutes

    def write(self, write, name, content):
        """Write a file -> whether that worked. If not, the run continues: there may be space later."""
        if self.place.rank > 0:
            return False
        try:
            write(Path(self.config.out_dir, name), content)
        except OSError as error:
            self.write_error = error
            say(f"warning: {error}; training continues")
            return False
        return True

    def check_health(self):
        """Raise RuntimeError if the run has diverged, before bad weights replace a good checkpoint."""
        if self.train_loss is None:
            return
        loss, grad_norm = self.train_loss.item(), self.grad_norm.item()
        healthy = loss < 3 * math.log(self.model.config.vocab_size)  # a uniform guess costs ln V
        if healthy and (self.scaler.is_enabled() or math.isfinite(grad_norm)):  # the scaler skips overflows
            return
        raise RuntimeError(
            f"training has diverged: loss {loss:.4g}, gradient norm {grad_norm:.4g} at step {self.iter:,}, learning "
            f"rate {self.lr:.3g}. {self.config.out_dir}/ckpt.pt still holds step {self.saved:,}; start again in "
            "another --out_dir with a lower --learning_rate, more --warmup_iters or a lower --grad_clip")


def parse(argv):
    """-> GPTConfig, TrainConfig, and the checkpoint to resume or to start from, or None.

    Raises ValueError if they do not fit together.
    """
    parser = flags.ArgumentParser("Train a GPT. Flags can be kept in a file: python train.py @config/cpu_demo")
    flags.add_flags(parser.add_argument_group("network"), GPTConfig, *NETWORK_FLAGS)
    flags.add_flags(parser.add_argument_group("run"), TrainConfig)
    args, checkpoint = parser.parse_args(argv), None
    out_dir = Path(args.out_dir)
    if args.resume:
        checkpoint = load_checkpoint(out_dir / "ckpt.pt")
        if "optimizer" not in checkpoint:
            raise ValueError(f"{out_dir}/ckpt.pt holds weights only, which can be scored, sampled and named by "
                             "--init_from, but not resumed")
        was = {"optimizer": "adamw", **checkpoint["args"]}  # older checkpoints were all trained with it
        args = flags.parse_again(parser, argv, was, FREE_ON_RESUME)
        if args.max_iters < checkpoint["iter"]:
            raise ValueError(f"{out_dir} has done {checkpoint['iter']} steps, more than --max_iters {args.max_iters}")
    elif any(out_dir.glob("*.pt")):
        raise ValueError(f"{out_dir} holds a run: add --resume to continue it, or choose another --out_dir")
    elif args.init_from:
        checkpoint = load_checkpoint(args.init_from)
        args = flags.parse_from(parser, argv, checkpoint["config"], NETWORK_FLAGS)
    network = GPTConfig(**{name: getattr(args, name) for name in NETWORK_FLAGS})
    return network, TrainConfig(**{knob.name: getattr(args, knob.name) for knob in fields(TrainConfig)}), checkpoint


def main(argv=None):
    network, config, checkpoint = parse(argv)
    place = Place(config, training_width=network.n_embd)
    place.join_processes(config.gradient_accumulation_steps)
    meta, ids = open_to_train(config.dataset, network.block_size, checkpoint, config.resume)
    ids = {name: token_tensor(part, place.device) for name, part in ids.items()}
    # A checkpoint's vocabulary can be larger than its tokenizer's: nanoGPT pads it.
    network = replace(network, vocab_size=checkpoint["config"]["vocab_size"] if checkpoint else meta["vocab_size"])
    try:
        with exclusive(config.out_dir, place.rank), explained_failures(network, config, place):
            run, taken = Run(network, config, meta, ids, place), None
            if config.resume:
                run.load(checkpoint)
            elif checkpoint:
                taken = init_weights(run.model, checkpoint)
            if place.rank == 0:
                cut_log(Path(config.out_dir, "log.jsonl"), run.iter if config.resume else -1)
                describe_run(run, taken)
            with stop_signals() as signals, tqdm(
                    total=config.max_iters, initial=run.iter, unit="step", dynamic_ncols=True,
                    disable=place.rank > 0 or not sys.stderr.isatty()) as bar:
                stopped = train(run, signals, bar)
            place.wait_for_others()  # nobody leaves before rank 0 has saved
            run.fast_model = None  # freed after the process group, DDP can deadlock
    finally:
        place.leave_processes()
    if run.write_error:
        raise run.write_error
    if place.rank == 0:
        describe_result(run, stopped)
    if stopped:
        sys.exit(128 + (signals or [15])[0])  # as if killed by the signal (15: another rank received it)


if __name__ == "__main__":
    flags.run(main)
