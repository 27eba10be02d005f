"""
Where a model runs: the device, the number format of its matrix products, torch.compile, and torchrun's processes.
"""
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import distributed, nn

from model import GPT, KVCache, setting

HAS_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()  # the CPU; private: it may disappear


@dataclass
class DeviceConfig:
    """The flags that all scripts share."""

    device: str = setting("auto", "cpu, cuda (NVIDIA and AMD), cuda:1, mps, xpu (Intel); auto: a GPU if there is one")
    dtype: str = setting("auto", "number format of matrix products; auto: float32 to score and sample; to train, "
                         "bfloat16 or else float16 on cuda, bfloat16 at width 256 or more on CPUs that have it",
                         one_of=("auto", "float32", "bfloat16", "float16"))


class Device:
    """A device and a number format. With torchrun it also knows the other processes, which divide the micro-batches of
    a step and share the mean gradient. If there are GPUs, each process has one of its own.

    training_width: n_embd if a model is to be trained there. Raises ValueError if there is no such device."""

    def __init__(self, config, training_width=0):
        self.torch_device = pick_device(config.device)
        self.type = self.torch_device.type
        self.dtype = pick_dtype(config.dtype, self.torch_device, training_width)
        self.rank, self.n_processes = 0, 1

    def __str__(self):
        if self.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return f"cpu ({torch.get_num_threads()} threads)" if self.type == "cpu" else str(self.torch_device)

    def free_memory(self):
        """Free bytes of a GPU of CUDA, None elsewhere."""
        return torch.cuda.mem_get_info(self.torch_device)[0] if self.type == "cuda" else None

    def autocast(self):
        """A context with matrix products in dtype, sums and norms in float32. It does nothing for float32."""
        return torch.autocast(self.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    @contextmanager
    def processes(self, n_micro_batches):
        """Work together with the other processes of torchrun, if there are any.

        Raises ValueError if they cannot share the micro-batches evenly."""
        if "RANK" not in os.environ:
            yield
            return
        # Imported later, its default arguments would keep the group alive, and its threads could abort at exit.
        import_module("torch.distributed.nn")
        distributed.init_process_group("nccl" if self.type == "cuda" else "gloo")
        try:
            self.rank, self.n_processes = distributed.get_rank(), distributed.get_world_size()
            if n_micro_batches % self.n_processes:
                raise ValueError(f"{self.n_processes} processes cannot share --gradient_accumulation_steps "
                                 f"{n_micro_batches} evenly: make it a multiple of {self.n_processes}")
            yield
            distributed.barrier()  # nobody leaves before rank 0 has saved
        finally:
            distributed.destroy_process_group()

    def mean(self, value):
        """The mean of a tensor over all processes. Does not wait for a GPU."""
        if self.n_processes > 1:
            value = value / self.n_processes
            distributed.all_reduce(value)
        return value

    def any(self, flag, step):
        """Whether a flag is true in any process; all have to ask at the same step. Several processes agree at every
        tenth step only, because that makes a GPU wait; in between, the answer is no."""
        if self.n_processes == 1:
            return flag
        return step % 10 == 0 and self.mean(torch.full((), float(flag), device=self.torch_device)).item() > 0

    def get_rng_state(self):
        """The states of the random numbers for dropout, one per process; all of them have to call this."""
        state = {kind: getattr(torch, kind).get_rng_state() for kind in {self.type} - {"cpu"}}
        states = [{"cpu": torch.get_rng_state(), **state}] * self.n_processes
        if self.n_processes > 1:
            distributed.all_gather_object(states, states[0])
        return states

    def set_rng_state(self, states):
        states = [states] if isinstance(states, dict) else states  # older checkpoints: that of rank 0
        for kind, state in states[min(self.rank, len(states) - 1)].items():
            if kind in ("cpu", self.type):  # not that of a GPU on which the run was before
                (torch if kind == "cpu" else getattr(torch, kind)).set_rng_state(state)


def pick_device(name):
    """--device -> torch.device. Raises ValueError if there is no such device, or nothing can be computed there."""
    auto = name == "auto"
    if auto:
        name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    if name == "cuda" and "RANK" in os.environ:  # torchrun: one GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.ones(8, 8, device=name)
        (x @ x).sum().item()  # a kernel has to run, too: an old GPU may have none in this build of PyTorch
    except (RuntimeError, AssertionError, ImportError) as error:
        absent = isinstance(error, (ImportError, NotImplementedError))  # a module of torch, or all of its operations
        reason = "this PyTorch is built without it" if absent else str(error).splitlines()[0]
        if auto and name != "cpu" and not is_out_of_memory(error):
            print(f"note: {name} cannot be used ({reason}); using the CPU")
            return torch.device("cpu")
        raise ValueError(f"--device {name} cannot be used: {reason}; use --device auto or --device cpu") from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # functions that ask for the current GPU then get this one
    return torch.device(name)


def pick_dtype(name, device, training_width=0):
    """--dtype -> torch.dtype. Scores are float32 on every device, so that they can be compared.

    A CPU gets bfloat16 only to train wide models: narrow ones gain little from it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and training_width:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and training_width >= 256 and HAS_BFLOAT16 else torch.float32


def pick_compile(choice, device, width, steps):
    """--compile, --no-compile or neither (None) -> bool. The default is on where it pays and works.

    Compiling takes about a minute and saves a part of each step. At width 256 or more, 1,000 steps take minutes, and
    this pays; a step of a narrower network takes milliseconds. Raises RuntimeError if --compile is given and fails."""
    pays = device.type == "cuda" and width >= 256 and steps >= 1000
    if choice is False or not (choice or pays):
        return False
    try:  # it needs a C compiler and Python's headers and, for a GPU, Triton
        torch.compile(lambda x: x.sin())(torch.ones(8, device=device))
        return True
    except Exception as error:  # of many kinds
        reason = f"torch.compile fails here ({type(error).__name__}: {error}".splitlines()[0] + ")"
        if choice:
            raise RuntimeError(f"{reason}: use --no-compile") from error
        print(f"note: {reason} and is not used")
        return False


@torch.no_grad()
def check_computation(model, device):
    """Compare a device other than the CPU with the CPU. Takes about a second. Raises RuntimeError.

    Some versions of PyTorch compute attention wrongly on some devices, without an error: it sees later tokens (issue
    195910 there), or cached keys are misread (169222, 182285). Compared is a network of the model's kind with at most
    four layers, its weights large enough for attention to count."""
    if device.type == "cpu":
        return
    with torch.random.fork_rng(devices=[]):
        network = GPT(replace(model.config, n_layer=min(4, model.config.n_layer))).eval()
        for weight in network.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=weight.size(-1) ** -0.5)
        ids = torch.randint(model.config.vocab_size, (1, min(256, model.config.block_size)))  # (1, T)
    other = torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % model.config.vocab_size), dim=1)
    expected, cache = network(ids, ids)[0], KVCache(ids.size(1))  # (1, T, V)
    network, ids, other = (x.to(device.torch_device) for x in (network, ids, other))
    with device.autocast():
        logits, changed = (network(x, x)[0].float().cpu() for x in (ids, other))
        network(ids[:, :-1], cache=cache)
        cached = network(ids[:, -1:], cache=cache)[0].float().cpu()  # (1, 1, V)
    rounding = 0.01 if device.dtype == torch.float32 else 0.05
    for fault, a, b, tolerance in (
            ("attention sees later tokens", changed[:, :-1], logits[:, :-1], 1e-5),  # the same operations
            ("logits differ from the CPU's", logits, expected, rounding),
            ("keys from the cache give other logits", cached, expected[:, -1:], rounding)):
        if not (a - b).norm() <= tolerance * b.norm():  # nan is a fault, too
            raise RuntimeError(f"PyTorch {torch.__version__} computes wrongly on {device} in {device.dtype}: {fault}: "
                               "use another version of PyTorch, --dtype float32 or --device cpu")


def is_out_of_memory(error):
    words = ("out of memory", "not enough memory", "allocate memory")  # CUDA's and the CPU's for it
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


@contextmanager
def explain_failures(network, config, device):
    """Turn a lack of memory into a RuntimeError that names the flags to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        gigabytes = memory_estimate(network, config.batch_size, device.dtype) / 1e9
        raise RuntimeError(f"out of memory on {device}; these flags need about {gigabytes:.1f} GB: halve --batch_size "
                           "and double --gradient_accumulation_steps for the same steps in half the memory, or lower "
                           "--block_size, --n_layer or --n_embd") from error


def memory_estimate(network, batch_size, dtype):
    """Bytes that training needs, within a quarter: weights, gradients, up to two moments, and what backward keeps."""
    C, V, tokens = network.n_embd, network.vocab_size, batch_size * network.block_size
    weights = 12 * network.n_layer * C * C + V * C
    # per channel, token and layer: norms 2, q k v and their rotated copies 5, attention and its projection 3, MLP 12;
    # logits, their softmax and their gradient are float32
    return 16 * weights + tokens * (22 * network.n_layer * C * dtype.itemsize + 3 * V * 4)


@contextmanager
def stop_signals():
    """Collect SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) in a list.

    A second SIGINT or SIGTERM raises KeyboardInterrupt."""
    terminals = [stream for stream in (1, 2) if os.isatty(stream)]  # asked now: a closed terminal is no longer one
    received, hangup = [], getattr(signal, "SIGHUP", None)  # Windows has no SIGHUP

    def note(number, frame):
        if number == hangup:  # there is no terminal to print to any more
            for stream in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        elif received:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # it is ignored under nohup
        numbers.append(hangup)
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
