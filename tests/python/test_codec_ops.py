"""torch.ops.dgls.encode and decode: weights as a stream of bytes, and back.

Goal: every bit of any bf16 tensor comes back; a stream is what docs/encoded-format.md says; what is
no stream of so many elements is a RuntimeError with what was needed and what was found, before
memory is taken; tracing works as for an op of torch.
Method: round trips; a reader made after the page, whose segments encoded_format.py decodes; one bad
argument at a time; streams changed at random by seed, in a process with little address space.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import encoded_format
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import dgls_torch

if TYPE_CHECKING:
    from processes import Processes

ops = torch.ops.dgls
FACTOR = int(os.environ.get("DGLS_SEEDS", "1"))
SEGMENT_BYTES = 4 << 20


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 0.02).bfloat16()


def patterns(values: Any) -> torch.Tensor:
    """A tensor of 16-bit patterns."""
    return torch.from_numpy(np.asarray(values, np.uint16).view(np.int16)).view(torch.bfloat16)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.int16)


def round_trip(weights: torch.Tensor) -> torch.Tensor:
    encoded = ops.encode(weights)
    assert encoded.dtype == torch.uint8
    assert encoded.dim() == 1
    found = ops.decode(encoded, weights.numel())
    assert found.dtype == torch.bfloat16
    assert found.shape == (weights.numel(),)
    assert torch.equal(bits(found), bits(weights))
    return encoded


def parts(stream: bytes) -> tuple[int, list[tuple[int, bytes]], bytes]:
    """As the page has it: elements, raw bytes and held bytes of each segment, the rest."""
    magic, version, elements, segments = struct.unpack_from("<IIQQ", stream)
    assert (magic, version) == (0x53574744, 1)
    at = -(-(24 + 8 * segments) // 256) * 256
    assert not any(stream[24 + 8 * segments : at])
    found = []
    for number in range(segments):
        raw, held = struct.unpack_from("<II", stream, 24 + 8 * number)
        found.append((raw, stream[at : at + held]))
        at += held
    return elements, found, stream[at:]


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 0), (1,), (1023,), (1024,), (1025,), (3, 5, 7), (64, 64), (1, 2048, 1)],
    ids=str,
)
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    weights = normal(*shape)
    encoded = round_trip(weights)
    assert encoded.numel() <= 256 + weights.nbytes
    assert torch.equal(ops.decode(encoded, weights.numel()).reshape(shape), weights)


def test_every_bit_pattern_comes_back() -> None:
    every = np.arange(1 << 16)
    round_trip(patterns(every))
    round_trip(patterns(np.random.default_rng(0).permutation(every)))
    for value in (0, 0x8000, 1, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF):
        round_trip(patterns(np.full(5000, value)))


def test_trained_weights_take_eleven_bits_and_noise_takes_the_front_more() -> None:
    weights = normal(1500, 1500)
    assert round_trip(weights).numel() < weights.nbytes * 11.1 / 16
    noise = patterns(np.random.default_rng(1).integers(0, 1 << 16, 3_000_000))
    assert round_trip(noise).numel() == 256 + noise.nbytes
    many = noise[: 1 << 20].repeat(62)  # 31 segments
    assert round_trip(many).numel() == 512 + many.nbytes


def test_the_stream_is_what_the_page_says() -> None:
    """A reader that shares nothing with the codec gets the weights back."""
    weights = normal(2 * SEGMENT_BYTES // 2 + 3 * 1024 + 17)
    half = SEGMENT_BYTES // 2
    noise = np.random.default_rng(2).integers(0, 1 << 16, half)
    weights[half : 2 * half] = patterns(noise)  # the second segment does not become smaller
    elements, segments, rest = parts(ops.encode(weights).numpy().tobytes())
    assert elements == weights.numel()
    assert [raw for raw, _ in segments] == [SEGMENT_BYTES, SEGMENT_BYTES, 3 * 2048]
    assert [len(held) < raw for raw, held in segments] == [True, False, True]
    found = [
        np.frombuffer(held, np.uint16) if len(held) == raw else encoded_format.decode(held)
        for raw, held in segments
    ]
    found.append(np.frombuffer(rest, np.uint16))
    assert np.array_equal(np.concatenate(found), bits(weights).numpy().view(np.uint16))


def test_segments_of_another_encoder_are_decoded() -> None:
    """Segments of any number of tiles, encoded by the reference with other bases."""
    elements = bits(normal(20 * 1024 + 3)).numpy().view(np.uint16)
    held = [
        encoded_format.encode(elements[: 3 * 1024]),
        encoded_format.encode(elements[3 * 1024 : 19 * 1024], np.full(16, 114)),
        elements[19 * 1024 : 20 * 1024].tobytes(),
    ]
    header = struct.pack("<IIQQ", 0x53574744, 1, len(elements), 3)
    sizes = zip([3 * 2048, 16 * 2048, 2048], map(len, held), strict=True)
    front = header + b"".join(struct.pack("<II", *pair) for pair in sizes)
    rest = elements[20 * 1024 :].tobytes()
    stream = b"".join([front.ljust(256, b"\0"), *held, rest])
    found = ops.decode(torch.frombuffer(bytearray(stream), dtype=torch.uint8), len(elements))
    assert np.array_equal(bits(found).numpy().view(np.uint16), elements)


def test_what_is_no_bf16_tensor_in_host_memory_is_not_encoded() -> None:
    weights = normal(64, 64)
    for bad, text in [
        (weights.float(), "weights must be BFloat16, found Float"),
        (weights.view(torch.int16), "weights must be BFloat16, found Short"),
        (weights.t(), "weights must be contiguous"),
        (weights[:, ::2], "weights must be contiguous"),
        (weights.to_sparse(), "weights must be a dense tensor, found another layout"),
        (weights.to("meta"), "weights must be on the CPU, found meta: weights are encoded on"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ops.encode(bad)


def test_what_is_no_stream_of_so_many_elements_is_not_decoded() -> None:
    weights = normal(3 * 1024 + 5)
    right = ops.encode(weights)
    count = weights.numel()

    def changed(at: int, value: int) -> torch.Tensor:
        wrong = right.clone()
        wrong[at] = value
        return wrong

    for bad, elements, text in [
        (right.float(), count, "encoded must be Byte, found Float"),
        (right.repeat(2)[::2], count, "encoded must be contiguous"),
        (right.reshape(1, -1), count, "encoded must have one dimension, found 2"),
        (right.to("meta"), count, "encoded must be on the CPU, found meta"),
        (right, -1, "elements must not be negative, got -1"),
        (right, 0, "0 elements were asked for, found an encoded stream of 3077"),
        (right, 1 << 62, "4611686018427387904 elements were asked for, found .* of 3077"),
        (right[:0], 0, "header of an encoded stream: 24 bytes needed, found 0"),
        (right[:-1], count, "size of an encoded stream must be"),
        (torch.cat([right, right]), count, "size of an encoded stream must be"),
        (changed(0, 0), count, "magic number of an encoded stream must be 0x53574744, found"),
        (changed(4, 2), count, "version of an encoded stream must be 0x1, found 0x2"),
        (changed(24, 1), count, "segment 0 of an encoded stream must have 1 to 8192 tiles"),
        (changed(22, 1), count, "table of an encoded stream: .* bytes needed, found"),
        (changed(256, 0), count, "segment 0 of an encoded stream: the magic number of an"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            ops.decode(bad, elements)
    assert torch.equal(ops.decode(right, count), weights)


@pytest.mark.needs_cuda
def test_tensors_on_the_device_are_refused() -> None:
    for call in (
        lambda: ops.encode(normal(2048).cuda()),
        lambda: ops.decode(ops.encode(normal(2048)).cuda(), 2048),
    ):
        with pytest.raises(RuntimeError, match="must be on the CPU, found another device"):
            call()


def test_parameters_and_inference_tensors() -> None:
    parameter = torch.nn.Parameter(normal(40, 64))
    encoded = round_trip(parameter)
    assert not encoded.requires_grad
    with torch.inference_mode():
        round_trip(normal(40, 64))


def test_schemas_and_opcheck() -> None:
    assert str(ops.encode.default._schema) == "dgls::encode(Tensor weights) -> Tensor"
    text = "dgls::decode(Tensor encoded, int elements) -> Tensor"
    assert str(ops.decode.default._schema) == text
    assert "decode(encoded, elements) -> weights" in (dgls_torch.ops.__doc__ or "")
    for shape in [(0,), (5,), (3, 2048)]:
        weights = normal(*shape)
        torch.library.opcheck(ops.encode.default, (weights,))
        torch.library.opcheck(ops.decode.default, (ops.encode(weights), weights.numel()))


def test_while_tracing_the_same_is_refused() -> None:
    with FakeTensorMode(), torch.device("cuda"):
        for call in (
            lambda: ops.encode(torch.empty(2048, dtype=torch.bfloat16)),
            lambda: ops.decode(torch.empty(2048, dtype=torch.uint8), 7),
        ):
            with pytest.raises(RuntimeError, match="must be on the CPU, found cuda:0: weights"):
                call()
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match=r"must be torch\.bfloat16, found torch\.float32"):
            ops.encode(torch.empty(7))
        made = ops.decode(torch.empty(300, dtype=torch.uint8), 9)
        assert (made.shape, made.dtype, made.device.type) == ((9,), torch.bfloat16, "cpu")


def test_in_a_compiled_function() -> None:
    def both(weights: torch.Tensor) -> torch.Tensor:
        return ops.decode(ops.encode(weights * 2), weights.numel()).reshape(weights.shape) + 1

    weights = normal(3, 2048)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(weights), both(weights))


FUZZ = """
import random, resource, torch
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
torch.set_num_threads(1)
chance = random.Random(SEED)
NUMBERS = [0, 1, 7, 255, 2048, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ops = torch.ops.dgls
weights = (torch.randn(9 * 1024 + 11) * 0.02).bfloat16()
weights[:1024] = torch.randn(1024).exp().bfloat16() ** 9
streams = [(n, bytes(ops.encode(weights[:n]).numpy())) for n in (9 * 1024 + 11, 2048, 1000, 0)]
log, told = open(PATH, "wb"), 0
for _ in range(ROUNDS):
    elements, stream = chance.choice(streams)
    changed = bytearray(stream)
    for _ in range(chance.randrange(1, 4)):
        way, at = chance.randrange(8), chance.randrange(len(changed) + 1)
        if way == 0:
            del changed[at:]
        elif way == 1:
            changed[at:at] = changed[at : at + chance.randrange(300)]
        elif way == 2:
            start = chance.choice([8, 16, 24, 256, 264])
            changed[start : start + 8] = chance.choice(NUMBERS).to_bytes(8, "little")
        elif way == 3:
            elements = chance.choice(NUMBERS[:-2])
            changed[8:16] = elements.to_bytes(8, "little")
        elif changed:
            at = chance.choice([at, at % 280])
            changed[min(at, len(changed) - 1)] ^= 1 << chance.randrange(8)
    log.seek(0)
    log.write(b"%d " % elements + changed)
    log.truncate()
    log.flush()
    given = torch.frombuffer(changed, dtype=torch.uint8) if changed else torch.empty(0).byte()
    try:
        found = ops.decode(given, elements)
        assert found.numel() == elements <= 10000, elements
    except RuntimeError as error:
        told += 1
        assert "encoded stream" in str(error), error
print(told)
"""


def test_streams_changed_at_random(processes: Processes, tmp_path: Any) -> None:
    rounds = 5000 * FACTOR
    settings = f"SEED, ROUNDS, PATH = 5, {rounds}, {str(tmp_path / 'stream')!r}\n"
    done = processes.run(settings + FUZZ, seconds=120 * FACTOR)
    assert done.code == 0, done.err[-2000:]
    assert rounds // 2 < int(done.out) < rounds
