"""A device's training throughput: from a GPU's data sheet, or measured by a short trial.

The trial takes a few real steps, forward and backward with teacher and taps, on random models. If
they do not fit in memory or would take too long, a matrix product is timed instead, and the
training is assumed to reach `gpus.SHARE` of its rate.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel

from koala.distillation.forward_process import generators_at
from koala.distillation.loop import gradients
from koala.distillation.parallel import World, lay_out
from koala.distillation.throughput import matmul_peak
from koala.recipes import gpus
from koala.recipes.memory import (
    TrainingSetup,
    batch_of,
    blank_student,
    blank_unet,
    task_of,
)
from koala.utils.device import free_bytes

PATIENCE = 30.0  # seconds, at most, of a trial
STEPS = 5  # at most, after one warm-up step
SIDE = 2048  # of the matrices multiplied on a CPU


@dataclass(frozen=True)
class DeviceThroughput:
    """The training throughput of a device."""

    flops: float  # FLOP/s of one device in training
    basis: str  # how it was determined
    device: str
    room: float  # GiB of memory


def assumed(card: str) -> DeviceThroughput:
    """Of a GPU by name, from its data sheet. UserError for an unknown name."""
    gib, tflops = gpus.get(card)
    basis = f"{gpus.SHARE:.0%} of {card}'s {tflops:,.0f} TFLOP/s assumed"
    return DeviceThroughput(gpus.SHARE * tflops * 1e12, basis, card, gib)


def measured(
    setup: TrainingSetup, device: torch.device, memory: int, flops: float
) -> DeviceThroughput:
    """Of `device`, measured in at most half a minute.

    memory: expected bytes of a step. flops: of a sample.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    free, room = _room(device)
    rate = matmul_peak(device) or _matmul_rate(device)
    expected = flops * setup.micro_batch / (gpus.SHARE * rate)
    if memory > free or expected * 2 > PATIENCE:
        why = "a step does not fit" if memory > free else "a step takes too long to time"
        basis = f"{gpus.SHARE:.0%} of a matrix product's {rate / 1e12:.3g} TFLOP/s assumed, {why}"
        return DeviceThroughput(gpus.SHARE * rate, basis, name, room)
    seconds, steps = _time_steps(setup, device)
    achieved = flops * setup.micro_batch / seconds
    share = f"{achieved / rate:.0%} of a matrix product's rate"
    basis = f"{steps} steps of {setup.micro_batch} measured, {share}"
    return DeviceThroughput(achieved, basis, name, room)


def _room(device: torch.device) -> tuple[float, float]:
    """(free bytes, total GiB) of the device's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free, total / 2**30
    return free_bytes(device), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _matmul_rate(device: torch.device) -> float:
    """FLOP/s on an fp32 matrix product."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    times = []
    for _ in range(3):  # the first is a warm-up
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)


def _time_steps(setup: TrainingSetup, device: torch.device) -> tuple[float, int]:
    """(seconds per step, timed steps) on random models, uncompiled, in one process.

    If steps train a critic by turns, both kinds are timed and weighted by their number.
    """
    student = _random(blank_student(setup), device)
    teacher = None if setup.teacher is None else _random(blank_unet(setup.teacher), device)
    task = task_of(setup, student, teacher)
    place = "whole" if device.type != "cuda" else setup.hardware.teacher.replace("sharded", "whole")
    alone = replace(setup.hardware, compile="", sharding="ddp", teacher=place, accumulate=1)
    layout = lay_out(task, alone, World(device=device))
    batch = batch_of(setup, device)
    updates = setup.training.critic_updates
    turns = {True: updates, False: 1} if updates else {False: 1}
    seconds, steps = 0.0, 0
    for of_critic, number in turns.items():
        times: list[float] = []
        begun, patience = time.perf_counter(), PATIENCE / 2 / len(turns)
        while len(times) <= STEPS and (len(times) < 2 or time.perf_counter() - begun < patience):
            start = time.perf_counter()
            generators = generators_at(0, 0, setup.micro_batch)
            losses = gradients(task, layout, batch, generators, of_critic)
            losses["loss"].item()  # waits for the device
            times.append(time.perf_counter() - start)
        seconds += number / (updates + 1) * min(times[1:])
        steps += len(times) - 1
    return seconds, steps


def _random(blank: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    unet = blank.to_empty(device=device)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return unet
