"""The kernels against float64: launches them from their images through the driver's own interface, on random ragged shapes, with fresh
memory full of NaNs. Needs numpy and libcuda.so.1 alone.

    gpu_kernels.py IMAGES ARGS_H [SEED]     prints one JSON object: {name: {"error": e, "limit": l}}, "passed"
"""

import ctypes
import json
import os
import re
import sys

import numpy as np

PAGE = 16
BF16_LIMIT, F32_LIMIT = 1e-2, 1e-5


class Driver:
    """A device with the kernels loaded."""

    def __init__(self, images):
        self.lib = ctypes.CDLL("libcuda.so.1")
        context, module, device = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        major, minor = (self.attribute(device, number) for number in (75, 76))
        name = "sm_90a.cubin" if (major, minor) == (9, 0) else "sm_80.cubin" if major == 8 else "compute_80.ptx"
        with open(os.path.join(images, name), "rb") as file:
            self.call("cuModuleLoadData", ctypes.byref(module), ctypes.create_string_buffer(file.read()))
        self.module = module

    def attribute(self, device, number):
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    def call(self, name, *arguments):
        code = getattr(self.lib, name)(*arguments)
        if code:
            raise SystemExit(f"{name}: error {code}")

    def buffer(self, array=None, nbytes=0):
        """The address of a copy of `array`, or of `nbytes` of NaNs."""
        if array is None:
            array = np.full(nbytes, 0xFF, np.uint8)
        array = np.ascontiguousarray(array)
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(array.nbytes))
        self.call("cuMemcpyHtoDAsync_v2", pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes), None)
        self.call("cuStreamSynchronize", None)
        return pointer.value

    def read(self, pointer, shape, dtype):
        array = np.empty(shape, dtype)
        self.call("cuMemcpyDtoHAsync_v2", array.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(pointer), ctypes.c_size_t(array.nbytes), None)
        self.call("cuStreamSynchronize", None)
        return array

    def launch(self, name, grid, threads, shared, args):
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self.module, name.encode())
        self.call("cuFuncSetAttribute", function, 8, max(shared, 0))
        params = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(args), ctypes.c_void_p))
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, None, params, None)
        self.call("cuStreamSynchronize", None)


def structs(path):
    """The arguments' layouts, from the header that the kernels themselves are compiled with."""
    types = {"unsigned": ctypes.c_uint32, "float": ctypes.c_float, "unsigned long long": ctypes.c_uint64}
    found = {}
    with open(path) as file:
        text = re.sub(r"//.*", "", file.read())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.S):
        fields = []
        for kind, star, field, count in re.findall(r"([\w ]+?)(\*?) (\w+)(?:\[(\d+)\])?;", body):
            ctype = ctypes.c_uint64 if star else types[kind.strip()]
            fields.append((field, ctype * int(count) if count else ctype))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found, {name: int(value) for name, value in re.findall(r"constexpr unsigned (\w+) = (\d+)u;", text)}


def bf16(x):
    """Bits of the nearest bf16."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def wide(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def whole_warps(items, most):
    return min(max(-(-items // 32) * 32, 32), most)


class Checks:
    def __init__(self, driver, header, rng):
        self.gpu, self.rng, self.results = driver, rng, {}
        self.args, self.constants = structs(header)

    def note(self, name, found, expected, limit):
        self.results[name] = {"error": error(found, expected), "limit": limit}

    def norm(self, rows, hidden):
        gpu, rng = self.gpu, self.rng
        x, y = (rng.normal(0, 2, (rows, hidden)).astype(np.float32) for _ in range(2))
        scale, shift = (1 + rng.normal(0, 0.2, hidden)).astype(np.float32), rng.normal(0, 0.1, hidden).astype(np.float32)
        px, out = gpu.buffer(x), gpu.buffer(nbytes=rows * hidden * 2)
        args = self.args["AddNorm"](px, gpu.buffer(y), 0, gpu.buffer(scale), gpu.buffer(shift), out, rows, hidden, 1e-5, 0)
        gpu.launch("add_norm", (rows, 1, 1), whole_warps(hidden // 4, 1024), 0, args)
        total = x.astype(np.float64) + y
        normed = (total - total.mean(1, keepdims=True)) / np.sqrt(total.var(1, keepdims=True) + 1e-5) * scale + shift
        self.note(f"residual {rows}x{hidden}", gpu.read(px, (rows, hidden), np.float32), total, F32_LIMIT)
        self.note(f"norm {rows}x{hidden}", wide(gpu.read(out, (rows, hidden), np.uint16)), normed, BF16_LIMIT)

    def all_reduce(self, rows, hidden, ranks):
        """One rank's launch, to which the others have come before: their numbers are staged and their flags raised."""
        gpu, rng = self.gpu, self.rng
        most, slices, flags = (self.constants["REDUCE_" + name] for name in ("ROWS", "SLICES", "FLAGS"))
        x, y = rng.normal(0, 2, (rows, hidden)).astype(np.float32), rng.normal(0, 1, (ranks, rows, hidden)).astype(np.float32)
        scale, shift = (1 + rng.normal(0, 0.2, hidden)).astype(np.float32), rng.normal(0, 0.1, hidden).astype(np.float32)
        areas = np.zeros((ranks, flags + 2 * most * hidden), np.uint32)
        areas[:, :flags].reshape(ranks, -1, 8)[0, :, 1:ranks] = 1
        # The first meeting stages in the second place.
        staged = areas[:, flags:].reshape(ranks, 2, most, hidden)
        staged[1:, 1, :rows] = y[1:].view(np.uint32)
        pointers = [gpu.buffer(area) for area in areas]
        px, out = gpu.buffer(x), gpu.buffer(nbytes=rows * hidden * 2)
        counts, stop = gpu.buffer(np.zeros(most * slices + most, np.uint32)), gpu.buffer(np.zeros(1, np.uint32))
        args = self.args["AllReduceNorm"]((ctypes.c_uint64 * 8)(*pointers), pointers[0], counts, stop, gpu.buffer(y[0]), px, gpu.buffer(scale),
                                          gpu.buffer(shift), out, hidden, 0, ranks, 1e-5)
        gpu.launch("all_reduce_norm", (slices, rows, 1), whole_warps(hidden // 4, 1024), 0, args)
        total = x + y.astype(np.float64).sum(0)
        normed = (total - total.mean(1, keepdims=True)) / np.sqrt(total.var(1, keepdims=True) + 1e-5) * scale + shift
        self.note(f"sum over {ranks} ranks {rows}x{hidden}", gpu.read(px, (rows, hidden), np.float32), total, F32_LIMIT)
        self.note(f"norm of it {rows}x{hidden}", wide(gpu.read(out, (rows, hidden), np.uint16)), normed, BF16_LIMIT)

    def sample(self, rows, vocab):
        """The largest logit."""
        gpu = self.gpu
        logits = self.rng.normal(0, 3, (rows, vocab)).astype(np.float32)
        row = self.args["SampleRow"]
        choices = (row * rows)(*(row(greedy=1, logits_row=index, slot=index, temperature=1.0) for index in range(rows)))
        tokens = gpu.buffer(nbytes=rows * 4)
        args = self.args["Sample"](gpu.buffer(logits), gpu.buffer(np.frombuffer(choices, np.uint8)), 0, 0, tokens, rows, vocab, vocab, 0)
        gpu.launch("sample", (rows, 1, 1), 1024, 0, args)
        chosen, best = gpu.read(tokens, (rows,), np.uint32), logits.argmax(1)
        self.note(f"greedy tokens {rows}x{vocab}", chosen.astype(np.float64), best.astype(np.float64), 0.0)

    def gemm(self, rows, n, cols, parts):
        gpu, rng = self.gpu, self.rng
        x, w = bf16(rng.normal(0, 1, (rows, cols))), bf16(rng.normal(0, 1, (n, cols)))
        out = gpu.buffer(nbytes=4 * parts * rows * n)
        args = self.args["Gemm"](gpu.buffer(x), gpu.buffer(w), out, rows, n, cols, parts, 0, 0)
        tile = next(tile for tile in (8, 16, 32, 64) if rows <= tile or tile == 64)
        gpu.launch(f"gemm_{tile}", (-(-rows // tile), -(-n // 128), parts), 128, 4 * (128 + tile) * 64 * 2, args)
        if parts > 1:
            sums, out = out, gpu.buffer(nbytes=4 * rows * n)
            args = self.args["GemmReduce"](sums, out, rows * n, parts, 0)
            gpu.launch("gemm_reduce", (-(-rows * n // 1024), 1, 1), 256, 0, args)
        self.note(f"gemm {rows}x{n}x{cols}/{parts}", gpu.read(out, (rows, n), np.float32), wide(x) @ wide(w).T, F32_LIMIT)

    def attention(self, lengths, heads, kv_heads, dim, prompt):
        """Decode: one row a sequence, at its end. Prompt: the last `prompt` rows of one sequence, in tiles."""
        gpu, rng = self.gpu, self.rng
        rotary = dim // 2
        pages = [-(-length // PAGE) for length in lengths]
        table = rng.permutation(sum(pages)).astype(np.uint32)
        first = np.concatenate([[0], np.cumsum(pages)[:-1]]).astype(np.uint32)
        cache = bf16(rng.normal(0, 1, (sum(pages), kv_heads, 2, PAGE, dim)))
        where = [(s, p) for s, length in enumerate(lengths) for p in range(length - (prompt or 1), length)]
        rows = len(where)
        positions = np.array([p for _, p in where], np.uint32)
        first_pages = np.array([first[s] for s, _ in where], np.uint32)
        qkv = rng.normal(0, 1, (rows, heads + 2 * kv_heads, dim)).astype(np.float32)
        angle = np.arange(max(lengths))[:, None] * 10000.0 ** (-2 * np.arange(rotary // 2) / rotary)
        rope = np.concatenate([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
        kv, q = gpu.buffer(cache), gpu.buffer(nbytes=rows * heads * dim * 2)
        on_device = [gpu.buffer(array) for array in (positions, first_pages, table)]
        args = self.args["RopeAppend"](gpu.buffer(qkv), gpu.buffer(rope), *on_device, q, kv, rows, heads, kv_heads, dim, rotary, PAGE)
        gpu.launch("rope_append", (rows, 1, 1), whole_warps((heads + 2 * kv_heads) * dim // 8, 512), 0, args)

        half = rotary // 2
        cos, sin = np.cos(angle[positions])[:, None], np.sin(angle[positions])[:, None]
        turned = qkv.astype(np.float64)
        a, b = turned[..., :half].copy(), turned[..., half:rotary].copy()
        rotated = slice(0, heads + kv_heads)
        turned[:, rotated, :half] = (a * cos - b * sin)[:, rotated]
        turned[:, rotated, half:rotary] = (b * cos + a * sin)[:, rotated]
        self.note(f"rope {rows} rows, dim {dim}", wide(gpu.read(q, (rows, heads, dim), np.uint16)), turned[:, :heads], BF16_LIMIT)
        for row, (s, p) in enumerate(where):
            page = table[first[s] + p // PAGE]
            cache[page, :, 0, p % PAGE] = bf16(turned[row, heads:heads + kv_heads])
            cache[page, :, 1, p % PAGE] = bf16(turned[row, heads + kv_heads:])

        splits = (max(lengths) - 1) // self.constants["SPLIT_TOKENS"] + 1
        out = gpu.buffer(nbytes=rows * heads * dim * 2)
        sums, stats = gpu.buffer(nbytes=rows * heads * splits * dim * 4), gpu.buffer(nbytes=rows * heads * splits * 8)
        group, tiles, tile_count = heads // kv_heads, 0, rows
        if prompt:
            step = 64 // group
            tile = [(r, min(step, rows - r), int(positions[r]), int(first[0])) for r in range(0, rows, step)]
            tiles, tile_count = gpu.buffer(np.array(tile, np.uint32)), len(tile)
        small = not prompt and group <= 16
        padded = 64 if dim <= 64 else 128 if dim <= 128 else 192
        height, warps, threads = (16, 4, 128) if small else (64, 8, 256)
        shared = height * padded * 2 + 2 * 2 * 64 * padded * 2 + height * 64 * 2 + warps * height * 4
        args = self.args["Attention"](q, kv, on_device[2], tiles, on_device[0], on_device[1], out, sums, stats, tile_count, heads, kv_heads, dim, PAGE, splits)
        gpu.launch(f"attention_{'decode' if small else 'prefill'}_{padded}", (tile_count, kv_heads, splits), threads, shared, args)
        if splits > 1:
            args = self.args["AttentionCombine"](sums, stats, on_device[0], out, rows, heads, dim, splits)
            gpu.launch("attention_combine", (rows, heads, 1), whole_warps(dim // 4, 64), 0, args)
        expected = np.zeros((rows, heads, dim))
        for row, (s, p) in enumerate(where):
            flat = wide(cache[table[first[s]:first[s] + pages[s]]]).transpose(2, 1, 0, 3, 4).reshape(2, kv_heads, -1, dim)[:, :, :p + 1]
            for head in range(heads):
                score = flat[0, head // group] @ wide(bf16(turned[row, head])) / np.sqrt(dim)
                weight = np.exp(score - score.max())
                expected[row, head] = weight @ flat[1, head // group] / weight.sum()
        kind = "prefill" if prompt else "decode"
        self.note(f"{kind} attention {lengths}, dim {dim}", wide(gpu.read(out, (rows, heads, dim), np.uint16)), expected, BF16_LIMIT)


def main():
    images, header = sys.argv[1:3]
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else int.from_bytes(os.urandom(4), "little")
    checks = Checks(Driver(images), header, np.random.default_rng(seed))
    checks.norm(3, 1024)
    checks.norm(2, 18432)
    checks.all_reduce(3, 1024, 2)
    checks.all_reduce(8, 18432, 8)
    checks.sample(2, 5000)
    checks.gemm(1, 200, 512, 1)
    checks.gemm(33, 136, 2048, 4)
    checks.attention([1, 77, 300], 12, 1, 192, 0)
    checks.attention([40], 8, 2, 64, 29)
    checks.attention([290], 6, 2, 128, 21)
    passed = all(check["error"] <= check["limit"] for check in checks.results.values())
    print(json.dumps({"seed": seed, "checks": checks.results, "passed": passed}))


main()
