"""GPUs by what their makers state, for a plan on paper. Imports no torch, so that a wrong name is found at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cap_hf.collection.resources import Resources
from cap_hf.errors import CAPError, readable

# How many processes a plan is made for where nothing says how many.
WORLDS = (1, 2, 4, 8)
# More of them than anybody has, and no more than a plan is quickly made for.
MOST_GPUS = 4096
KEYS = ("gpu", "count", "memory")


@dataclass(frozen=True)
class Hardware:
    """What one GPU has.

    Attributes:
        name: of it.
        memory: bytes.
        float32: floating point operations a second in float32, without TF32.
        float64: in float64.
        bfloat16: in bfloat16, dense, on tensor cores where it has some for that.
        bandwidth: bytes a second to its memory and from it.
    """

    name: str
    memory: float
    float32: float
    float64: float
    bfloat16: float
    bandwidth: float

    def describe(self) -> str:
        """Return what it has, in words."""
        rates = f"{self.float32 / 1e12:.3g} TFLOP/s in float32, {self.float64 / 1e12:.3g} in float64"
        return f"{self.name} ({readable(int(self.memory))}, {rates}, {self.bandwidth / 1e12:.3g} TB/s)"


def _stated(name: str, memory: float, float32: float, float64: float, bfloat16: float, bandwidth: float) -> Hardware:
    """Return a GPU of so many gigabytes, TFLOP/s and gigabytes a second."""
    return Hardware(name, memory * 1e9, float32 * 1e12, float64 * 1e12, bfloat16 * 1e12, bandwidth * 1e9)


# From the makers' data sheets, of the SXM or OAM form where there are several; a GPU without bfloat16 has its rate in
# float32. Those for workstations and games have a fraction of their float32 rate in float64.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _stated("T4", 16, 8.1, 0.25, 8.1, 320),
        _stated("V100", 32, 15.7, 7.8, 15.7, 900),
        _stated("A10", 24, 31.2, 0.49, 125, 600),
        _stated("A100", 80, 19.5, 9.7, 312, 2039),
        _stated("L4", 24, 30.3, 0.47, 121, 300),
        _stated("L40S", 48, 91.6, 1.4, 362, 864),
        _stated("RTX3090", 24, 35.6, 0.56, 71, 936),
        _stated("RTX4090", 24, 82.6, 1.3, 165, 1008),
        _stated("H100", 80, 67, 34, 989, 3350),
        _stated("H200", 141, 67, 34, 989, 4800),
        _stated("B200", 180, 75, 37, 2250, 7700),
        _stated("MI300X", 192, 163, 82, 1307, 5300),
    )
}


def parse_hardware(text: str) -> tuple[Hardware, Sequence[int]]:
    """Return the GPU that `gpu=H100,count=8,memory=40GB` names, and for how many of them a plan is wanted.

    Raises:
        CAPError: the text is none of this kind, or the GPU is not known.
    """
    words = [part.partition("=") for part in text.split(",")]
    found = {key.strip().lower(): value.strip() for key, _, value in words}
    if len(found) < len(words) or "gpu" not in found or not all(key in KEYS and value for key, value in found.items()):
        raise CAPError(f"plan_for={text!r} is not such as gpu=H100,count=8 or gpu=A100,memory=40GB")
    gpu = next((each for name, each in GPUS.items() if name.lower() == found["gpu"].lower()), None)
    if gpu is None:
        raise CAPError(f"plan_for: gpu={found['gpu']} is none of {', '.join(GPUS)}")
    if "memory" in found:
        try:
            gpu = replace(gpu, memory=float(Resources(max_memory=found["memory"]).bytes or 0))
        except CAPError as error:
            raise CAPError(f"plan_for: memory={found['memory']} is not a size such as 40GB") from error
    count = found.get("count")
    if count is None:
        return gpu, WORLDS
    if not (count.isascii() and count.isdigit() and 1 <= int(count) <= MOST_GPUS):
        raise CAPError(f"plan_for: count={count} is not a whole number of GPUs from 1 to {MOST_GPUS}")
    return gpu, (int(count),)
