// Decodes encoded bf16 and fp8 weights (docs/encoded-format.md). scripts/ptx.py makes decode.ptx of
// this file, which is what runs; tests/kernels/ compiles it for the CPU.
//
// A warp decodes a tile, and each lane its own 32 elements: with bit b of some words it handles
// element b, so that one operation is done to 32 elements, or to the two of an output word.

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

// An enum, since NVRTC makes a variable of each constant.
enum : u32 {
  MOST_SEGMENTS = 32,
  THREADS = 256,  // of a block
  LANES = 32,     // of a warp
  ALL_LANES = 0xFFFFFFFF,

  // Of an encoded segment. An offset within one is below 2^25.
  MAGIC_OF_FP8 = 0x31464744,
  HEADER_BYTES = 256,
  TILE_PLANES_BYTES = 256,
  TILE_ENTRY_BYTES = 8,
  GROUP_BYTES = 12,
};

// Device addresses of an encoded segment, a multiple of 256, and of where its elements go, a
// multiple of 16. Nothing else may write either while the kernel runs.
struct Segment {
  u64 source;
  u64 target;
};

// The kernel's only argument; src/driver/cuda has the same in Rust.
struct Batch {
  u32 count;                          // of segments, at least 1
  u32 first_tile[MOST_SEGMENTS + 1];  // of each segment, and after the last the number of tiles
  Segment segments[MOST_SEGMENTS];
};
static_assert(sizeof(Batch) == 648, "the kernel's callers know its size");

// One word for each bit of the two levels' codes; bit b is element b's.
struct Codes {
  u32 first[2];
  u32 second[3];
};

// Where the ones of a mask are, in the form that `spread` needs.
struct Mask {
  u32 bits;
  u32 moves[5];
};

// A word of an encoded segment: never written while the kernel runs.
template <typename Word>
__device__ __forceinline__ Word load(const u8* source, u32 offset) {
  return __ldg(reinterpret_cast<const Word*>(source + offset));
}

// The sum of the values of the lanes before this one.
__device__ __forceinline__ u32 sum_before(u32 value, u32 lane) {
  u32 sum = value;
#pragma unroll
  for (u32 distance = 1; distance < LANES; distance *= 2) {
    const u32 before = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += before;
  }
  return sum - value;
}

// The last segment that begins at or before a tile. A warp has one tile: no lane differs.
__device__ __forceinline__ u32 segment_of(const Batch& batch, u32 tile) {
  u32 found = 0;
#pragma unroll
  for (u32 step = MOST_SEGMENTS / 2; step > 0; step /= 2) {
    const u32 next = found + step;
    if (next < batch.count && batch.first_tile[next] <= tile) found = next;
  }
  return found;
}

// Hacker's Delight, 7-4 and 7-5: each of the mask's ones has to go down by the number of zeros
// below it. Word i of the moves has those that go down by 2^i, where they are at that time.
__device__ __forceinline__ Mask moves_of(u32 bits) {
  Mask mask;
  mask.bits = bits;
  u32 zeros_below = ~bits << 1;
#pragma unroll
  for (u32 i = 0; i < 5; ++i) {
    u32 is_odd = zeros_below ^ (zeros_below << 1);
    is_odd ^= is_odd << 2;
    is_odd ^= is_odd << 4;
    is_odd ^= is_odd << 8;
    is_odd ^= is_odd << 16;
    mask.moves[i] = is_odd & bits;
    bits = (bits ^ mask.moves[i]) | (mask.moves[i] >> (1 << i));
    zeros_below &= ~is_odd;
  }
  return mask;
}

// Puts a word's bits, from the lowest on, where the mask has its ones, from the lowest on: what a
// CPU's PDEP does. The moves back, the last one first.
__device__ __forceinline__ u32 spread(u32 word, const Mask& mask) {
#pragma unroll
  for (int i = 4; i >= 0; --i) {
    word = (word & ~mask.moves[i]) | ((word << (1 << i)) & mask.moves[i]);
  }
  return word & mask.bits;
}

// The second-level codes of this lane, each where its element is; zeros elsewhere. The lane's first
// code has this rank; at most 32 follow each other and lie in one group or in two.
__device__ __forceinline__ void load_second(Codes& codes, const u8* source, u32 offset, u32 rank,
                                            const Mask& mask) {
  const u32 group = offset + rank / 32 * GROUP_BYTES;
#pragma unroll
  for (u32 i = 0; i < 3; ++i) {
    const u32 low = load<u32>(source, group + 4 * i);
    const u32 high = load<u32>(source, group + GROUP_BYTES + 4 * i);
    codes.second[i] = spread(__funnelshift_r(low, high, rank % 32), mask);
  }
}

// What differs between the two kinds of elements.
struct Bf16 {
  using Signs = uint2;  // of the eight elements of a row that a lane has
  enum : u32 { TILE_SIGNS_BYTES = 1024, RAW_BYTES = 2, EXPONENT_BIT = 7 };
};
struct Fp8 {  // e4m3
  using Signs = u32;
  enum : u32 { TILE_SIGNS_BYTES = 512, RAW_BYTES = 1, EXPONENT_BIT = 3 };
};

// The exponents of the elements k and k + 16 from a bit of each half word on; of fp8 four bits of
// them count. Those under a second-level 7 are to be overwritten; they reach no other element: 255
// + 10 has 9 bits.
template <u32 BIT>
__device__ __forceinline__ u32 exponents(const Codes& codes, u32 far, u32 bases, u32 k) {
  constexpr u32 PAIR = 0x00010001;
  u32 sum = bases;
  sum += ((((codes.first[0] & ~far) | codes.second[0]) >> k) & PAIR) * (1 << BIT);
  sum += ((((codes.first[1] & ~far) | codes.second[1]) >> k) & PAIR) * (2 << BIT);
  sum += ((~far >> k) & PAIR) * (4 << BIT);
  sum += ((codes.second[2] >> k) & PAIR) * (7 << BIT);
  return sum;
}

// Two elements of their sign bytes, pair m % 2 of a word, and their exponents.
__device__ __forceinline__ u32 join_bf16(u32 signs, u32 m, u32 exponents) {
  const u32 spaced = __byte_perm(signs, 0, m % 2 == 0 ? 0x4140 : 0x4342);
  return ((spaced << 8) & 0x80008000) | (spaced & 0x007F007F) | exponents;
}

// Four elements of the low halves of their sign bytes, and their exponents, two in each word.
__device__ __forceinline__ u32 join_fp8(u32 signs, u32 low, u32 high) {
  return ((signs << 4) & 0x80808080) | (signs & 0x07070707) |
         (__byte_perm(low, high, 0x6420) & 0x78787878);
}

// Row j of a lane's elements, eight that follow each other.
__device__ __forceinline__ void store_row(u8* target, uint2 signs, const u32* pairs, Bf16) {
  *reinterpret_cast<uint4*>(target) =
      make_uint4(join_bf16(signs.x, 0, pairs[0]), join_bf16(signs.x, 1, pairs[1]),
                 join_bf16(signs.y, 2, pairs[2]), join_bf16(signs.y, 3, pairs[3]));
}
__device__ __forceinline__ void store_row(u8* target, u32 signs, const u32* pairs, Fp8) {
  *reinterpret_cast<uint2*>(target) =
      make_uint2(join_fp8(signs, pairs[0], pairs[1]), join_fp8(signs >> 4, pairs[2], pairs[3]));
}

// One element that is an escape: its row's signs, and its place among the eight.
__device__ __forceinline__ void store_escape(u8* row, const u8* source, u32 signs, u32 i,
                                             u32 exponent, Bf16) {
  const u32 sign = load<u8>(source, signs + i);
  *reinterpret_cast<u16*>(row + 2 * i) =
      static_cast<u16>(((sign & 0x80) << 8) | (exponent << 7) | (sign & 0x7F));
}
__device__ __forceinline__ void store_escape(u8* row, const u8* source, u32 signs, u32 i,
                                             u32 exponent, Fp8) {
  const u32 sign = load<u8>(source, signs + i % 4) >> (i / 4 * 4);
  row[i] = static_cast<u8>(((sign & 8) << 4) | ((exponent << 3) & 0x78) | (sign & 7));
}

// A tile of a segment with so many, by the lanes of a warp.
template <typename Element>
__device__ __forceinline__ void decode_tile(const u8* source, u8* target, uint4 header, u32 tiles,
                                            u32 tile, u32 lane, Element element) {
  constexpr u32 ROW_SIGNS = Element::TILE_SIGNS_BYTES / 4, LANE_SIGNS = ROW_SIGNS / LANES;
  constexpr u32 LANE_RAW = 8 * Element::RAW_BYTES, ROW_RAW = LANE_RAW * LANES;
  const u32 planes = HEADER_BYTES + Element::TILE_SIGNS_BYTES * tiles;
  const u32 table = planes + TILE_PLANES_BYTES * tiles;
  const uint2 entry = load<uint2>(source, table + TILE_ENTRY_BYTES * tile);
  Codes codes;
  const u32 plane = planes + TILE_PLANES_BYTES * tile + 4 * lane;
  codes.first[0] = load<u32>(source, plane);
  codes.first[1] = load<u32>(source, plane + 4 * LANES);
  const u32 signs_at = HEADER_BYTES + Element::TILE_SIGNS_BYTES * tile + LANE_SIGNS * lane;
  typename Element::Signs signs[4];
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    signs[j] = load<typename Element::Signs>(source, signs_at + ROW_SIGNS * j);
  }

  const u32 far = codes.first[0] & codes.first[1];  // a first-level 3
  const u32 rank = entry.x + sum_before(__popc(far), lane);
  load_second(codes, source, header.z, rank, moves_of(far));
  u32 escaped = codes.second[0] & codes.second[1] & codes.second[2];  // a second-level 7
  u32 escape = header.w + (entry.y & 0xFFFFFF) + sum_before(__popc(escaped), lane);

  const u32 bases = (entry.y >> 24) * (0x00010001u << Element::EXPONENT_BIT);
  u8* own = target + 4 * ROW_RAW * tile + LANE_RAW * lane;
#pragma unroll
  for (u32 j = 0; j < 4; ++j) {
    u32 pairs[4];
#pragma unroll
    for (u32 m = 0; m < 4; ++m) {
      pairs[m] = exponents<Element::EXPONENT_BIT>(codes, far, bases, 4 * j + m);
    }
    store_row(own + ROW_RAW * j, signs[j], pairs, element);
  }

  // One in a hundred elements: the same thread writes over what it has written.
  while (escaped != 0) {
    const u32 bit = __ffs(static_cast<int>(escaped)) - 1;
    escaped &= escaped - 1;
    const u32 j = bit / 4 % 4, i = bit % 4 * 2 + bit / 16;
    const u32 exponent = load<u8>(source, escape++);
    store_escape(own + ROW_RAW * j, source, signs_at + ROW_SIGNS * j, i, exponent, element);
  }
}

// One block for each eight tiles.
extern "C" __global__ void __launch_bounds__(THREADS) decode(const Batch batch) {
  const u32 lane = threadIdx.x % LANES;
  const u32 number = (blockIdx.x * THREADS + threadIdx.x) / LANES;
  if (number >= batch.first_tile[batch.count]) return;
  const u32 segment = segment_of(batch, number);
  const u32 tiles = batch.first_tile[segment + 1] - batch.first_tile[segment];
  const u32 tile = number - batch.first_tile[segment];
  const u8* source = reinterpret_cast<const u8*>(batch.segments[segment].source);
  u8* target = static_cast<u8*>(__cvta_global_to_generic(batch.segments[segment].target));
  const uint4 header = load<uint4>(source, 0);  // magic, tiles, second level, escapes
  if (header.x == MAGIC_OF_FP8) {
    decode_tile(source, target, header, tiles, tile, lane, Fp8());
  } else {
    decode_tile(source, target, header, tiles, tile, lane, Bf16());
  }
}
