"""Codes of keys and values as numbers, in the registers of a GPU: 16-bit floats, two at a time.

Small integers become floats by their bits: 0x6400 | x is 1024 + x for x below 1024.  A kernel reads codes as 32-bit
words where it can: the same byte of two neighbouring words goes into one register, which is how products take their
operands.  (Triton's own conversions take three times as many instructions.)
"""

# mypy: ignore-errors

import triton.language as tl

WORDS_INT4 = tl.constexpr("""{
.reg .b32 t, u, v, low, high, m, one, less, part, more;
mov.b32 low, 0x000f000f; mov.b32 high, 0x00f000f0; mov.b32 m, 0x64006400;
mov.b32 one, 0x3c003c00; mov.b32 less, 0xe408e408; mov.b32 part, 0x2c002c00; mov.b32 more, 0xd480d480;
prmt.b32 t, $8, $9, 0x5410;
lop3.b32 v, t, low, m, 0xea;
fma.rn.f16x2 $0, v, one, less;
lop3.b32 v, t, high, m, 0xea;
fma.rn.f16x2 $1, v, part, more;
shr.b32 u, t, 8;
lop3.b32 v, u, low, m, 0xea;
fma.rn.f16x2 $2, v, one, less;
lop3.b32 v, u, high, m, 0xea;
fma.rn.f16x2 $3, v, part, more;
prmt.b32 t, $8, $9, 0x7632;
lop3.b32 v, t, low, m, 0xea;
fma.rn.f16x2 $4, v, one, less;
lop3.b32 v, t, high, m, 0xea;
fma.rn.f16x2 $5, v, part, more;
shr.b32 u, t, 8;
lop3.b32 v, u, low, m, 0xea;
fma.rn.f16x2 $6, v, one, less;
lop3.b32 v, u, high, m, 0xea;
fma.rn.f16x2 $7, v, part, more;
}""")
"""Two words of 8 numbers -> of each the low and high half of bytes 0, 1, 2, 3: x - 8, the high ones by / 16 first."""

WORDS_INT8 = tl.constexpr("""{
.reg .b32 t, v, low, m, one, less;
mov.b32 low, 0x00ff00ff; mov.b32 m, 0x64806480; mov.b32 one, 0x3c003c00; mov.b32 less, 0xe480e480;
prmt.b32 t, $4, $5, 0x5410;
lop3.b32 v, t, low, m, 0x6a;
fma.rn.f16x2 $0, v, one, less;
shr.b32 t, t, 8;
lop3.b32 v, t, low, m, 0x6a;
fma.rn.f16x2 $1, v, one, less;
prmt.b32 t, $4, $5, 0x7632;
lop3.b32 v, t, low, m, 0x6a;
fma.rn.f16x2 $2, v, one, less;
shr.b32 t, t, 8;
lop3.b32 v, t, low, m, 0x6a;
fma.rn.f16x2 $3, v, one, less;
}""")
"""Two words of 4 numbers -> of each bytes 0, 1, 2, 3; the sign bit is turned round, so that 1152 is to be taken off."""

WORDS_FP8 = tl.constexpr("""{
.reg .b32 t;
.reg .b16 a, b;
prmt.b32 t, $4, $5, 0x5140;
mov.b32 {a, b}, t;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
prmt.b32 t, $4, $5, 0x7362;
mov.b32 {a, b}, t;
cvt.rn.f16x2.e4m3x2 $2, a;
cvt.rn.f16x2.e4m3x2 $3, b;
}""")

BYTES_INT4 = tl.constexpr("""{
.reg .b32 t, v, low, high, m, one, less, part, more;
mov.b32 low, 0x000f000f; mov.b32 high, 0x00f000f0; mov.b32 m, 0x64006400;
mov.b32 one, 0x3c003c00; mov.b32 less, 0xe408e408; mov.b32 part, 0x2c002c00; mov.b32 more, 0xd480d480;
prmt.b32 t, $4, 0, 0x4140;
lop3.b32 v, t, low, m, 0xea;
fma.rn.f16x2 $0, v, one, less;
lop3.b32 v, t, high, m, 0xea;
fma.rn.f16x2 $2, v, part, more;
prmt.b32 t, $4, 0, 0x4342;
lop3.b32 v, t, low, m, 0xea;
fma.rn.f16x2 $1, v, one, less;
lop3.b32 v, t, high, m, 0xea;
fma.rn.f16x2 $3, v, part, more;
}""")
"""Four bytes -> their low halves, and their high ones."""

BYTES_INT8 = tl.constexpr("""{
.reg .b32 t, v, low, m, one, less;
mov.b32 low, 0x00ff00ff; mov.b32 m, 0x64806480; mov.b32 one, 0x3c003c00; mov.b32 less, 0xe480e480;
prmt.b32 t, $2, 0, 0x4140;
lop3.b32 v, t, low, m, 0x6a;
fma.rn.f16x2 $0, v, one, less;
prmt.b32 t, $2, 0, 0x4342;
lop3.b32 v, t, low, m, 0x6a;
fma.rn.f16x2 $1, v, one, less;
}""")

BYTES_FP8 = tl.constexpr("""{
.reg .b16 a, b;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
}""")

LOGARITHM_AND_INVERSE = tl.constexpr("lg2.approx.ftz.f32 $0, $2; rcp.approx.ftz.f32 $1, $2;")
