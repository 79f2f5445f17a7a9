# Copyright 2026 physai_decode developers
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Compile every kernel of the native engine for one compute capability; no GPU is needed.

Run ``python compile_kernels.py 90`` in a process of its own, because the other tests use Triton's
interpreter.
"""

from itertools import product
import re
import sys

from physai_decode.engines import compiler
from physai_decode.engines import sampling_kernels
from physai_decode.engines.native import fp4_kernels
from physai_decode.engines.native import int4_kernels
from physai_decode.engines.native import kernels
from physai_decode.engines.native import lookup
from physai_decode.engines.native import pass_kernels
from physai_decode.engines.native import prefill_kernels
from physai_decode.engines.native import routing_kernels
from physai_decode.engines.native import scaled_kernels
from physai_decode.engines.native.linear import Int4
from physai_decode.engines.native.prefill_tiling import rule
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    'table': '{half}', 'token': 'i64', 'position': 'i64', 'history': 'i64', 'weight': '{half}',
    'bias': '{half}', 'gain': '{half}', 'q_gain': '{half}', 'k_gain': '{half}', 'keys': '{half}',
    'values': '{half}', 'packed': 'i16', 'scales': 'fp16', 'zeros': 'fp16', 'order': 'i32',
    'places': 'i32', 'arrived': 'i32', 'seen': 'u8', 'integers': 'i64', 'counts': 'i32',
    'masses': 'i64', 'state': 'i64', 'found': 'i32', 'number': 'i32',
    'slots': 'i32', 'owners': 'i32', 'start': 'i64', 'count': 'i64', 'place': 'i64', 'q': '{half}',
    'mask': 'u8'}      # all others are fp32
# Pointers in passes, otherwise None.
IN_PASSES = {'active': 'i32', 'draft_token': 'i64', 'next_active': 'i32'}
NUMBERS = {'n': 'i32', 'vocab': 'i32', 'hidden': 'i32', 'max_context': 'i32',
           'eps': 'fp32', 'scale': 'fp32', 'first': 'i32', 'rows': 'i32', 'k': 'i32',
           'blocks': 'i32', 'tokens': 'i32', 'stride': 'i32', 'width': 'i32', 'held': 'i32',
           'total': 'i32'}
UNFINISHED = r'wgmma.wait_group.sync.aligned [^0]'
NARROW = r'ld\.global\S*evict_first\S*\.b16'       # loads weights one by one
MULTIPLES = ('n', 'k', 'tokens', 'hidden', 'stride', 'width')      # of 16 in the engine


def compiled(kernel, capability, half, warps=4, x='fp32', out='fp32', parts='fp32', values=None,
             scales='fp16', zeros='fp16', codes='u8', table=None, ids='i64', passes=False,
             **constants):
    """Compile one kernel; ``half`` is bf16 or fp16."""
    kinds = {**POINTERS, **IN_PASSES, 'x': x, 'out': out, 'parts': parts, 'scales': scales,
             'zeros': zeros, 'values': values or POINTERS['values'],
             'codes': codes, 'table': table or POINTERS['table'], 'ids': ids}
    signature, values, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = 'constexpr'
            values[(index,)] = constants.pop(name)
        elif name in IN_PASSES and not passes:
            signature[name] = 'constexpr'
            values[(index,)] = None
        elif name in NUMBERS:
            signature[name] = NUMBERS[name]
            if kernel.fn.__module__ == prefill_kernels.__name__ and name in MULTIPLES:
                attributes[(index,)] = [['tt.divisibility', 16]]
        else:
            signature[name] = '*' + kinds.get(name, 'fp32').format(half=half)
            attributes[(index,)] = [['tt.divisibility', 16]]
    assert not constants, f'{kernel} has no {", ".join(constants)}'
    source = ASTSource(kernel, *_described(kernel, signature, values, attributes))
    options = {'num_warps': warps, **({'launch_pdl': True} if supports_pdl(capability) else {}),
               'enable_fp_fusion': kernel.fn.__module__ != pass_kernels.__name__}
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)


def _described(kernel, signature, values, attributes):
    """Return signature, values and attributes as this version of Triton takes them."""
    if compiler.VERSION >= (3, 3):
        return signature, values, attributes
    names = [parameter.name for parameter in kernel.params]
    signature = {name: kind for name, kind in signature.items() if kind != 'constexpr'}
    values = {names[index]: value for (index,), value in values.items()}
    divisible = [index for (index,) in attributes]
    if compiler.VERSION == (3, 2):
        from triton.backends.compiler import AttrsDescriptor
        return signature, values, AttrsDescriptor.from_dict({
            'arg_properties': {'tt.divisibility': divisible, 'tt.equal_to': []},
            'cls': 'AttrsDescriptor'})
    from triton.compiler import AttrsDescriptor
    signature = {names.index(name): kind for name, kind in signature.items()}
    values = {names.index(name): value for name, value in values.items()}
    return signature, values, AttrsDescriptor(divisible_by_16=set(divisible))


def supports_pdl(capability):
    """Return whether the engine starts kernels before the previous one ends on such a chip."""
    return compiler.KNOWS_PDL and capability >= 90


def main():
    """Compile each kernel in configurations that the engine launches."""
    capability = int(sys.argv[1])
    pdl = supports_pdl(capability)
    for half in ('fp16', 'bf16') if capability >= 80 else ('fp16',):
        def build(kernel, capability=capability, half=half, **constants):
            return compiled(kernel, capability, half, PDL=pdl, **constants)

        build(kernels._embed, BLOCK=1024, SCALE=1.0)
        build(kernels._add_normed, K=1152, WIDE=2048, BLOCK=512)
        build(kernels._join, out=half, D=96, DIMS=128, SPLITS=8, BLOCK=32)
        compiled(int4_kernels._dequantise, capability, half, warps=1, out=half, K=3584, BLOCKS=7,
                 GROUP=128, ZEROS=True, TABLE=False, table='i32')
        build(kernels._prepare, out=half, K=3584, WIDE=4096, BLOCK=512, NORM=True, ORDERED=True)
        for norm, dim in ((True, 128), (False, 128), (True, 256)):
            build(kernels._attend, warps=4 if norm else 1, KV_HEADS=4, GROUP=7, PADDED=16, D=dim,
                  DIMS=dim, SPLITS=8, TOKENS=32, WINDOW=0, NORM=norm, BETA=0.1 * norm,
                  LENGTH=16384)
        build(kernels._select, COUNT=100, WIDE=128, BLOCK=128, TOP_K=8, NORMALISED=True)
        for gated, layout, selected in (
                (True, kernels.DENSE_LAYOUTS[0], 0), (False, kernels.DENSE_LAYOUTS[6], 0),
                (True, kernels.DENSE_LAYOUTS[2], 1), (False, kernels.DENSE_LAYOUTS[5], 8)):
            made = build(kernels._dense, warps=layout.warps, x='fp32' if gated else half,
                         out=half if gated else 'fp32', K=3584 * max(1, selected), SIZE=3584,
                         STACK=7 * 2**20 * bool(selected), ROWS=layout.rows,
                         COLUMNS=layout.columns, STAGES=layout.stages, NORM=gated, GATED=gated,
                         GELU=gated, ADD=not gated, BIAS=gated)
            assert not re.search(NARROW, made.asm['ptx'])
            if pdl and not (gated and selected):
                ahead, _, _ = made.asm['ptx'].partition('griddepcontrol.wait')
                assert 'evict_first' in ahead
        # Each form in the usual layout and another; each layout with and without gates and zeros.
        for gated, zeros, selected, other, has_table in (
                (True, False, 0, (4, 3), False), (False, True, 0, (4, 3), False),
                (True, True, 0, (8, 0), False),
                (True, True, 1, (1, 1), False), (False, False, 8, (1, 1), False),
                (False, False, 8, (1, 1), True)):
            for warps, stages in ((4, 1), other):
                made = build(
                    int4_kernels._int4, warps=warps, x=half, out=half if gated else 'fp32',
                    K=3584 * max(1, selected), BLOCKS=7 * max(1, selected), SIZE=7,
                    STACK=2**13 * bool(selected), GROUP=128, ROWS=16, SPLIT=warps, STAGES=stages,
                    GATED=gated, GELU=gated, ADD=not gated, BIAS=False, ZEROS=zeros,
                    TABLE=has_table, ASSEMBLY=True, table='i32')
                # Triton uses tensor cores from 8.0 on, and fused multiply-adds before.
                wanted = 'mma.sync' if capability >= 80 else 'fma.rn.f32'
                assert wanted in made.asm['ptx'] and (has_table or 'lop3.b32' in made.asm['ptx'])
                if capability >= 80 and stages == 1 and compiler.VERSION >= (3, 5):
                    # Lanes load what they multiply, so shared memory holds only the sums of warps.
                    assert made.metadata.shared <= 64 * warps
                assert not re.search(NARROW, made.asm['ptx'])
                if pdl and (warps, stages, selected) == (4, 1, 0):
                    # All words are requested while the previous kernel still runs.
                    ahead, _, after = made.asm['ptx'].partition('griddepcontrol.wait')
                    assert 'evict_first' in ahead and 'evict_first' not in after
        for at, layout in enumerate(int4_kernels.TABLE_LAYOUTS):
            gated = at % 2 == 0
            made = build(
                int4_kernels._int4, warps=layout.warps, x=half, out=half if gated else 'fp32',
                K=3584, BLOCKS=14, SIZE=14, STACK=0, GROUP=64, ROWS=layout.rows,
                SPLIT=layout.warps * 16 // layout.rows, STAGES=layout.stages, GATED=gated,
                GELU=False, ADD=not gated, BIAS=False, ZEROS=False, TABLE=True, ASSEMBLY=True,
                table='i32')
            assert ('dp4a.u32.u32' in made.asm['ptx']) is compiler.TUPLES
            if compiler.TUPLES and (capability >= 80 or at == 0):
                # Before 8.0, products use shared memory too, so only the first must fit.
                assert made.metadata.shared + lookup.STATIC_BYTES <= 48 * 2**10
        if compiler.VERSION >= (3, 3):      # see compiler.problem
            made = build(int4_kernels._int4, warps=4, K=3584, BLOCKS=14, SIZE=14, STACK=0,
                         GROUP=64, ROWS=16, SPLIT=4, STAGES=1, GATED=False, GELU=False, ADD=True,
                         BIAS=False, ZEROS=False, TABLE=True, ASSEMBLY=True, table='i32')
            assert ' pairs[' not in made.asm['ptx']     # in float32, they would not fit
        passes(build, half, capability)
        scaled(build, half, capability, pdl)
        fp4(build, half, capability, pdl)
        if capability >= 80:
            prefill(build, half, capability)
    sampling(capability, BLOCK=1024, PROGRAMS=149, PENALTY=True, PDL=pdl)
    print('compiled')


def scaled(build, half, capability, pdl):
    """Compile the kernels for 8-bit weights, with scales per row and per group."""
    for gated, by_row, selected in ((True, True, 0), (False, False, 0), (True, False, 1),
                                    (False, True, 8)):
        layout = kernels.DENSE_LAYOUTS[0 if gated else 2]
        made = build(scaled_kernels._multiply, values='i8', scales='fp32', zeros='fp32',
                     warps=layout.warps, out=half if gated else 'fp32',
                     K=3584 * max(1, selected), SIZE=3584, STACK=7 * 2**20 * bool(selected),
                     GROUP=3584 if by_row else 128, ROWS=layout.rows, COLUMNS=layout.columns,
                     STAGES=layout.stages if compiler.PIPELINES else 1, FLOAT=not by_row,
                     ZEROS=False, BY_ROW=by_row, NORM=gated, GATED=gated, GELU=False,
                     ADD=not gated, BIAS=gated and not selected, ASSEMBLY=True)
        assert by_row or 'prmt.b32' in made.asm['ptx']
        if pdl and not (gated and selected):
            ahead, _, _ = made.asm['ptx'].partition('griddepcontrol.wait')
            assert 'evict_first' in ahead
    compiled(scaled_kernels._widen, capability, half, values='i8', scales='fp32', zeros='fp32',
             out=half, K=3584, GROUP=128, GROUPS=28, BLOCK=1024, FLOAT=True, ZEROS=False,
             ASSEMBLY=True)


def fp4(build, half, capability, pdl):
    """Compile the kernels for 4-bit floats."""
    for gated, warps, stages, selected in ((True, 4, 1, 0), (False, 1, 3, 0), (False, 8, 1, 0),
                                           (True, 1, 1, 1), (False, 4, 1, 8)):
        sizes = {'K': 3584 * max(1, selected), 'BLOCKS': 14 * max(1, selected), 'SPLIT': warps,
                 'STAGES': stages, 'GATED': gated, 'GELU': gated, 'ADD': not gated,
                 'BIAS': gated and not selected, 'ASSEMBLY': True}
        out = half if gated else 'fp32'
        if not compiler.PIPELINES and stages > 1:
            continue
        made = build(fp4_kernels._fp4, warps=warps, x=half, scales='i32', out=out, SIZE=14,
                     STACK=2**13 * bool(selected), **sizes)
        assert 'lop3.b32' in made.asm['ptx']
        assert not re.search(NARROW, made.asm['ptx'])
        if compiler.VERSION >= (3, 6) and capability >= 80:     # words stay as they are loaded
            assert not re.search(r'convert_layout.*xi16', made.asm['ttgir'])
        if capability >= 80 and stages == 1 and compiler.VERSION >= (3, 3):
            assert made.metadata.shared <= 64 * warps       # only the sums of warps
        if pdl and stages == 1 and not (gated and selected):
            ahead, _, _ = made.asm['ptx'].partition('griddepcontrol.wait')
            assert 'evict_first' in ahead
        if stages == 1 and not selected:
            build(pass_kernels._fp4_rows, warps=warps, x=half, scales='i32', out=out,
                  passes=True, **sizes)
    compiled(fp4_kernels._widen, capability, half, warps=1, scales='i32', out=half, K=3584,
             BLOCKS=14)


def prefill(build, half, capability):
    """Compile the kernels of a prefill, in some of the sizes that the engine launches."""
    own = prefill_kernels
    matrix = {9: 'wgmma.mma_async', 10: 'tcgen05.mma', 11: 'tcgen05.mma'}.get(
        capability // 10, 'mma.sync')
    build(own._embed, out=half, K=3584, BLOCK=4096, SCALE=34.0, PLACED=True)
    build(own._add, out=half, parts=half, K=3584, BLOCK=4096, PARTS=1, BIAS=True, NORM=False,
          PLACED=False)
    build(own._add, out=half, K=2048, BLOCK=2048, PARTS=4, BIAS=False, NORM=True, PLACED=True)
    build(own._reorder, x=half, out=half, K=3584, BLOCK=1024, PLACED=True)
    build(own._gate_up, parts=half, out=half, N=9472, BLOCK=2048, PARTS=1, BIAS=True, PAIRED=True,
          GELU=False, PLACED=True)
    build(own._last, BLOCK=512, PARTS=2, BIAS=True)
    build(own._join, out=half, HEADS=28, ROWS=4, D=128, DIMS=128, SPLITS=4, PLACED=True)
    for first, norm in ((0, True), (28, False)):
        build(own._rotate, HEADS=28, KV_HEADS=4, FIRST=first, ROWS=8, D=128, DIMS=64, PARTS=2,
              BIAS=True, NORM=norm, BETA=0.1 * norm, LENGTH=16384)
    for tile, splits, window, dim in (((64, 64, 4, 2), 4, 0, 128), ((128, 64, 8, 3), 1, 512, 128),
                                      ((64, 32, 4, 2), 2, 512, 256)):
        rows, columns, warps, stages = tile
        made = build(own._attend, warps=warps, out=half, HEADS=28, GROUP=7, D=dim, DIMS=dim,
                     M=rows, N=columns, SPLITS=splits, WINDOW=window, STAGES=stages,
                     PLACED=splits == 1)
        assert matrix in made.asm['ptx']
        if dim == 256:      # every supported chip has that much
            assert made.metadata.shared <= 99 * 1024
    build(routing_kernels._route, ids='i32', EXPERTS=128, WIDE=128, BLOCK=16, TOP_K=8,
          NORMALISED=True, PARTS=2)
    build(routing_kernels._count, ids='i32', BLOCK=1024)
    build(routing_kernels._arrange, ids='i32', EXPERTS=128, WIDE=128, TOKENS=16, BLOCK=1024,
          MOST=256)
    for gated, experts in product((False, True), repeat=2):
        common = {'x': half, 'out': half if gated else 'fp32', 'GATED': gated, 'GELU': gated,
                  'BIAS': gated and not experts, 'EXPERTS': experts}
        made = build(own._dense, ROWS=64, COLUMNS=64, TOKENS=32, STAGES=4, PAIRED=gated,
                     PLACED=False, **common)
        assert matrix in made.asm['ptx']
        packed = {'TILES': 4, 'TOKENS': 32, 'STAGES': 4, 'EXACT': gated, 'PLACED': gated,
                  'ASSEMBLY': True, **common}
        for made in (
                build(own._int4, GROUP=128, WARPS=4, ZEROS=not gated, TABLE=False, **packed),
                build(own._int4, GROUP=64, WARPS=4, ZEROS=False, TABLE=True, table='i32',
                      **{**packed, 'STAGES': 5}),
                build(own._fp4, scales='i32', GROUP=64, **packed)):
            assert matrix in made.asm['ptx']
            assert any(word in made.asm['ptx'] for word in ('lop3.b32', 'dp4a', 'ld.global'))
            # The next iteration overwrites the weights' registers, so it must wait.
            assert not re.search(UNFINISHED, made.asm['ptx'])
            if '.b8 pairs[' in made.asm['ptx']:     # otherwise a launch fails, see `_takes`
                assert made.metadata.shared > 48 * 2**10
        for real, by_row in product((False, True), repeat=2):
            made = build(own._scaled, values='i8', scales='fp32', zeros='fp32', GROUP=128,
                         ROWS=64, COLUMNS=128, TOKENS=64, STAGES=4, FLOAT=real,
                         ZEROS=not by_row and not real, BY_ROW=by_row, PLACED=False,
                         ASSEMBLY=True, **common)
            assert matrix in made.asm['ptx'] and not re.search(UNFINISHED, made.asm['ptx'])
    if capability // 10 in (10, 11):    # with more tensor memory, a kernel cannot be loaded
        weight = Int4(torch.empty(1, 1, 16 * 128), *(None,) * 4, 37888, 3584)
        for tokens, gated in product((16, 64, 128, 256, 512), (False, True)):
            tiling = rule(weight, tokens, gated, 20, 232448, True)
            if tiling.rows:
                made = build(own._int4, warps=tiling.warps, x=half, out=half if gated else 'fp32',
                             GROUP=128, TILES=tiling.rows // 16, WARPS=tiling.warps,
                             TOKENS=tiling.tokens, STAGES=tiling.stages, EXACT=True, GATED=gated,
                             GELU=False, BIAS=False, ZEROS=False, TABLE=False, PLACED=False,
                             EXPERTS=False, ASSEMBLY=True)
                assert made.metadata.tmem_size <= 512
    compiled(own._unpack, capability, half, out=half, GROUP=128, TILES=4, ZEROS=True,
             ASSEMBLY=True)


def passes(build, half, capability):
    """Compile the kernels of passes; the number of rows is an argument."""
    own = pass_kernels
    build(own._embed_rows, BLOCK=1024, SCALE=1.0)
    build(own._add_normed_rows, K=1152, WIDE=2048, BLOCK=512)
    build(own._prepare_rows, out=half, K=3584, WIDE=4096, BLOCK=512, NORM=True, ORDERED=False)
    for norm, window, warps, together in ((True, 0, 1, 2), (False, 64, 4, 8)):
        sizes = {'KV_HEADS': 4, 'GROUP': 7, 'D': 128, 'DIMS': 128, 'NORM': norm}
        made = build(own._attend_rows, warps=warps, **sizes, PADDED=16 * warps, SPLITS=8,
                     TOKENS=32, TOGETHER=together, WINDOW=window, BETA=0.0, LENGTH=1)
        # Between the new keys and values and the loop that reads them.
        between = re.search(r'st\.global((?!st\.global).)*?(ld\.global|cp\.async)',
                            made.asm['ptx'], re.DOTALL)
        assert 'bar.sync' in between[0]
    for layout in own.PASS_DENSE_LAYOUTS[::5]:
        for gated in (True, False):
            made = build(own._dense_rows, warps=layout.warps, x=half,
                         out=half if gated else 'fp32', K=3584, TILE=layout.rows,
                         COLUMNS=layout.columns, SPLIT=layout.split, STAGES=layout.stages,
                         GATED=gated, GELU=False, ADD=not gated, BIAS=gated)
            if capability >= 80:
                assert all(word in made.asm['ptx'] for word in ('mma.sync', 'cp.async'))
    for gated, ahead, warps in ((True, True, 4), (False, False, 4), (False, True, 8)):
        made = build(own._int4_rows, warps=warps, x=half, out=half if gated else 'fp32', K=3584,
                     BLOCKS=7, GROUP=128, SPLIT=warps, AHEAD=ahead, GATED=gated, GELU=False,
                     ADD=not gated, BIAS=False, ZEROS=False, TABLE=not gated,
                     ASSEMBLY=True, table='i32')
        assert 'mma.sync' in made.asm['ptx'] or capability < 80
        if capability >= 80 and compiler.VERSION >= (3, 5):
            assert made.metadata.shared <= 512 * warps      # the sums of warps, as in a step


def sampling(capability, **layout):
    """Compile the kernels of sampling, each with all stages and with the fewest."""
    compiled(sampling_kernels._allow, capability, 'fp16', BLOCK=layout['BLOCK'],
             PDL=layout['PDL'])
    for few in (True, False):
        layout['passes'] = few
        compiled(sampling_kernels._top, capability, 'fp16', **layout)
        for kernel in (sampling_kernels._bin, sampling_kernels._border):
            compiled(kernel, capability, 'fp16', warps=8, **layout, PADDED=256, TOP_K=True,
                     TOP_P=not few)
        compiled(sampling_kernels._pick, capability, 'fp16', **layout, PADDED=256, DRAW=not few,
                 TRUNCATED=not few, MINIMUM=not few)


if __name__ == '__main__':
    main()
