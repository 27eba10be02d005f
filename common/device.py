"""
Where a model runs: the device, the number format of its matrix products, torch.compile, and torchrun's processes.
"""
import copy
import importlib.util
import os
import shutil
import signal
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from model import KVCache, setting

HAS_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private: it may disappear


@dataclass
class DeviceConfig:
    """The flags that all scripts share."""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, ...; auto takes the best available")
    dtype: str = setting("auto", "number format of matrix products; auto: float32 to score and sample; to train, "
                         "bfloat16 on GPUs that have it and, at width 256 or more, on CPUs that have it, float16 on "
                         "older GPUs", one_of=("auto", "float32", "bfloat16", "float16"))


class Device:
    """A device and a number format. With torchrun it also knows the other processes, each with a GPU of its own, which
    divide the micro-batches of a step and share the mean gradient.

    training_width: n_embd if a model is to be trained there. Raises ValueError if there is no such device."""

    def __init__(self, config, training_width=0):
        self.torch_device = pick_device(config.device)
        self.type = self.torch_device.type
        self.dtype = pick_dtype(config.dtype, self.torch_device, training_width)
        self.rank, self.n_processes = 0, 1
        if self.type == "cuda" and training_width:
            torch.set_float32_matmul_precision("high")  # TF32: 10 bits of fraction, several times faster than float32

    def __str__(self):
        """The device as results name it: a GPU's own name, or the number of threads that a CPU provided."""
        if self.type == "cuda":
            return torch.cuda.get_device_name(self.torch_device)
        return f"{self.torch_device} ({torch.get_num_threads()} threads)"

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
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.n_processes
        return value

    def any(self, flag, step):
        """Whether a flag is true in any process. All of them have to ask at the same step.

        Several processes agree at every tenth step only, because that makes a GPU wait; in between, the answer is no.
        """
        if self.n_processes == 1:
            return flag
        return step % 10 == 0 and self.mean(torch.full((), float(flag), device=self.torch_device)).item() > 0

    def get_rng_state(self):
        """The states of the random numbers for dropout, one per process; all of them have to call this.

        Batches need no random state: they are a function of the step."""
        state = {"cpu": torch.get_rng_state()}
        if self.type in ("cuda", "mps"):
            state[self.type] = getattr(torch, self.type).get_rng_state()
        states = [state] * self.n_processes
        if self.n_processes > 1:
            distributed.all_gather_object(states, state)
        return states

    def set_rng_state(self, states):
        states = [states] if isinstance(states, dict) else states  # older checkpoints: that of rank 0
        state = states[min(self.rank, len(states) - 1)]
        torch.set_rng_state(state["cpu"])
        if state.get(self.type) is not None and self.type != "cpu":
            getattr(torch, self.type).set_rng_state(state[self.type])


def pick_device(name):
    """--device -> torch.device. Raises ValueError if there is no such device, RuntimeError if its memory is full."""
    auto = name == "auto"
    if auto:  # cuda (AMD's GPUs, too), mps, xpu
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if name == "cuda" and "RANK" in os.environ:  # torchrun: one GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        x = torch.ones(8, 8, device=name)
        (x @ x).sum().item()  # a kernel has to run, too: an old GPU may have none in this build of PyTorch
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise RuntimeError(f"--device {name}: its memory is full: stop what else runs there, or use --device cpu"
                               ) from error
        if auto and name != "cpu":
            print(f"note: {name} cannot be used ({str(error).splitlines()[0]}); using the CPU")
            return torch.device("cpu")
        raise ValueError(f"--device {name}: there is no such device here, or this build of PyTorch does not support "
                         "it; use --device auto or --device cpu") from error
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # functions that ask for the current GPU then get this one
    return device


def pick_dtype(name, device, training_width=0):
    """--dtype -> torch.dtype. Scores are float32 on every device, so that they can be compared.

    A CPU gets bfloat16 only to train wide models: narrow ones gain little from it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda" and training_width:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and training_width >= 256 and HAS_BFLOAT16():
        return torch.bfloat16
    return torch.float32


def pick_compile(choice, device, width, steps):
    """--compile, --no-compile or neither (None) -> bool.

    The default is on if Triton can build kernels for the GPU and if that pays. Compiling takes about a minute. It saves
    a part of each step: at width 256 and more, 1,000 steps take minutes; those of narrower networks take milliseconds.
    """
    if choice is not None or device.type != "cuda" or width < 256 or steps < 1000:
        return bool(choice)
    # Triton builds the code that launches a kernel with a C compiler and Python's headers
    compiler = any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang")))
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()
    return (importlib.util.find_spec("triton") is not None and compiler and headers
            and torch.cuda.get_device_capability(device) >= (7, 0))  # Volta, the oldest that Triton supports


@torch.no_grad()
def check_computation(model, device):
    """Compare a GPT on a device with itself on the CPU, in a second or less; nothing is done if it is the CPU.

    Some versions of PyTorch compute wrong attention on some devices without an error: it sees future tokens (issue
    195910 there), or cached keys are misread (169222, 182285). Raises RuntimeError."""
    if device.type == "cpu":
        return
    training, reference = model.training, copy.deepcopy(model).to("cpu", torch.float32).eval()
    ids = torch.arange(min(model.config.block_size, 128))[None] * 7919 % model.config.vocab_size  # (1, T)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % model.config.vocab_size
    ids_there, other, cache = ids.to(device.torch_device), other.to(device.torch_device), KVCache(ids.size(1))
    model.eval()
    with device.autocast():
        logits, changed = (model(x, x)[0].float().cpu() for x in (ids_there, other))  # (1, T, V)
        model(ids_there[:, :-1], cache=cache)
        cached = model(ids_there[:, -1:], cache=cache)[0].float().cpu()  # (1, 1, V)
    model.train(training)
    expected = reference(ids, ids)[0]
    rounding = 0.01 if device.dtype == torch.float32 else 0.1
    for fault, a, b, tolerance in (
            ("attention sees later tokens", logits[:, :-1], changed[:, :-1], 1e-5),  # the same operations
            ("logits differ from the CPU's", logits, expected, rounding),
            ("reading through the cache differs from reading at once", cached[0], expected[:, -1], rounding)):
        if not (a - b).abs().max() < tolerance * expected.abs().max():  # nan is a fault, too
            raise RuntimeError(f"PyTorch {torch.__version__} computes wrongly on {device} in {device.dtype}: {fault}: "
                               "use another version of PyTorch, --dtype float32 or --device cpu")


def is_out_of_memory(error):
    words = ("out of memory", "not enough memory", "allocate memory")  # CUDA's and the CPU's for it
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


@contextmanager
def explain_failures(network, config, device):
    """Turn a lack of memory, or a failure of torch.compile, into a RuntimeError that names the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise RuntimeError("torch.compile failed; continue without it: python train.py --resume --no-compile "
                               f"--out_dir {config.out_dir}. {error}") from error
        if not is_out_of_memory(error):
            raise
        gigabytes = memory_estimate(network, config.batch_size, device.dtype) / 1e9
        raise RuntimeError(f"out of memory on {device}; these flags need about {gigabytes:.1f} GB: halve --batch_size "
                           "and double --gradient_accumulation_steps for the same steps in half the memory, or lower "
                           "--block_size, --n_layer or --n_embd") from error


def memory_estimate(network, batch_size, dtype):
    """Bytes that training needs, roughly: weights, gradients, up to two moments, and what backward keeps."""
    C, V, tokens = network.n_embd, network.vocab_size, batch_size * network.block_size
    weights = 12 * network.n_layer * C * C + V * C
    # channels kept per token and layer: norms 2, q k v and their rotated copies 5, attention and its projection 3,
    # the MLP of four times the width 12
    return 16 * weights + tokens * (network.n_layer * 22 * C * dtype.itemsize + 3 * V * 4)


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
