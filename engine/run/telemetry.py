"""What the machine did in a step: the memory of this process; of its GPU the memory, load and power."""

import os
import resource
from pathlib import Path

import pynvml
import torch

from ..config import GIB


class Telemetry:
    """Reads this rank's machine. Every key starts with mem/ or time/: the values may differ between equal runs."""

    def __init__(self, device: torch.device):
        self._device = device
        if device.type == "cuda":
            self._nvml_id = f"GPU-{torch.cuda.get_device_properties(device).uuid}"

    def sample(self) -> dict[str, float]:
        """Host memory now and at its highest; on a GPU the highest since the last call, load (%) and power (W)."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        values = {
            "mem/rss_gib": pages * os.sysconf("SC_PAGE_SIZE") / GIB,
            "mem/peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        }
        if self._device.type == "cuda":
            values["mem/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated(self._device) / GIB
            values["mem/gpu_peak_reserved_gib"] = torch.cuda.max_memory_reserved(self._device) / GIB
            torch.cuda.reset_peak_memory_stats(self._device)
            values |= self._load_and_power()
        return values

    def _load_and_power(self) -> dict[str, float]:
        try:
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByUUID(self._nvml_id)
            return {
                "time/gpu_busy_percent": pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
                "time/gpu_watts": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
            }
        except pynvml.NVMLError:  # MIG slices and containers without the driver's library tell neither
            return {}
