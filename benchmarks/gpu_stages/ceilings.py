"""What this device allows: the denominators of all later fractions.

copy       bytes read plus bytes written a second, of a device-to-device copy of 1 GiB (far beyond any L2)
products   8192 x 8192 x 8192 on random numbers, in bf16, and in fp32 without TF32: FLOP/s
launch     seconds from one small kernel's start to the next when Python launches them one after another
"""

import torch

from .report import Stage, plant
from .timing import median_ms


def run(stage: Stage) -> None:
    device = stage.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info()
        stage.row(
            "device",
            properties.name,
            note=f"{properties.multi_processor_count} SMs, sm_{properties.major}{properties.minor}, "
            f"{total / 2**30:.0f} GiB ({free / 2**30:.0f} free), L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        )
    copied = stage.part("copy", lambda: copy(stage))
    bf16 = stage.part("bf16 product", lambda: product(stage, torch.bfloat16))
    fp32 = stage.part("fp32 product", lambda: product(stage, torch.float32))
    launched = stage.part("launch", lambda: launch(stage))
    stage.ceilings.update(copy_bytes_per_s=copied, bf16_flops=bf16, fp32_flops=fp32, launch_s=launched)


def copy(stage: Stage) -> float:
    count = 2**20 if stage.rehearse else 2**28
    source, target = torch.randn(count, device=stage.device), torch.empty(count, device=stage.device)
    ms = median_ms(lambda: target.copy_(source), stage.device, seconds=0.2).median
    found = 2 * 4 * count / (ms * 1e-3)
    stage.row("copy", found / 1e9, "GB/s", note="read plus written", value=found)
    return found


def product(stage: Stage, dtype: torch.dtype) -> float:
    size = 256 if stage.rehearse else 8192
    assert torch.get_float32_matmul_precision() == "highest"
    a, b = (torch.randn(size, size, device=stage.device).to(dtype) for _ in range(2))
    ms = median_ms(lambda: a @ b, stage.device, seconds=0.3).median
    found = 2 * size**3 / (ms * 1e-3)
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    stage.row(f"{name} product", found / 1e12, "TFLOP/s", note=f"{size}³, random", value=found)
    return found


def launch(stage: Stage) -> float:
    plant("exception")
    x, count = torch.zeros(256, device=stage.device), 200 if stage.rehearse else 2000

    def kernels():
        for _ in range(count):
            x.add_(1.0)

    found = median_ms(kernels, stage.device, seconds=0.2).median * 1e-3 / count
    stage.row("launch", 1e6 * found, "µs", note="x.add_(1) of 256 numbers, one after another", value=found)
    return found
