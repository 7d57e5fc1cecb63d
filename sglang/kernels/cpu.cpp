// What a step of a few tokens does on a CPU. cpu.py says what the arguments are. The vectors are GNU
// C++'s: gcc and clang make of them what the CPU has, but for two instructions that they do not find.

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t MANY_TOKENS = 16;  // are worth a second thread, however little each of them is

using Floats [[gnu::vector_size(4 * LANES)]] = float;
using Ints [[gnu::vector_size(4 * LANES)]] = int32_t;
using Words [[gnu::vector_size(4 * LANES)]] = uint32_t;
using Shorts [[gnu::vector_size(2 * LANES)]] = int16_t;
using Halves [[gnu::vector_size(2 * LANES)]] = _Float16;
using Floats4 [[gnu::vector_size(16)]] = float;

template <typename Vector>
inline Vector load(const void* at) {
  Vector vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

inline Floats load(const float* at) { return load<Floats>(at); }

inline void store(Floats vector, float* at) { std::memcpy(at, &vector, sizeof vector); }

inline Floats load(const _Float16* at) {
#ifdef __AVX2__
  return _mm256_cvtph_ps(load<__m128i>(at));
#else
  return __builtin_convertvector(load<Halves>(at), Floats);
#endif
}

inline float sum(Floats v) {
  Floats4 low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
  Floats4 four = low + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

inline float largest(Floats v) {
  float most = v[0];
  for (int64_t i = 1; i < LANES; i++) most = std::max(most, v[i]);
  return most;
}

inline Ints nearest(Floats x) {
  return __builtin_convertvector(x + (x < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
}

// 2^n times a Taylor series of e^f, where x = n ln 2 + f. ln 2 is in two parts, of which n times the
// first is exact.
inline Floats exp(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;
  Floats n = x * 1.44269504f;
  Ints whole = nearest(n);
  n = __builtin_convertvector(whole, Floats);
  Floats f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats series = Floats{} + 1.0f / 5040;
  series = series * f + 1.0f / 720;
  series = series * f + 1.0f / 120;
  series = series * f + 1.0f / 24;
  series = series * f + 1.0f / 6;
  series = series * f + 0.5f;
  series = series * f + 1.0f;
  series = series * f + 1.0f;
  return series * (Floats)((whole + 127) << 23);
}

// --- products with quantized weights ---------------------------------------------------------------

constexpr int64_t GROUP = 32;  // inputs that share a scale

// A group's weights of LANES outputs, one in each lane. A weight is q scale + low. Of two inputs side
// by side the q are 16 bits apart in a word; it has several such pairs, the first one lowest.
template <int BITS>
struct Block {
  static constexpr int PAIRS = 16 / BITS, WORDS = GROUP / 2 / PAIRS;
  static constexpr uint32_t FIRST_PAIR = ((1u << BITS) - 1) * 0x10001u;
  _Float16 scales[LANES], lows[LANES];
  uint32_t words[WORDS][LANES];
};

// Inputs as whole numbers of 16 bits times a scale for each group: off by a 65,000th of the group's
// largest at most.
struct Inputs {
  static constexpr float MOST = 32767.0f;
  int64_t groups;
  std::vector<int16_t> q;           // [tokens, groups, GROUP]
  std::vector<float> scales, sums;  // [tokens, groups]

  Inputs(const float* x, int64_t tokens, int64_t size)
      : groups(size / GROUP), q(tokens * size), scales(tokens * groups), sums(tokens * groups) {
    for (int64_t g = 0; g < tokens * groups; g++) {
      Floats most = {};
      for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += LANES) {
        Floats values = load(x + i), sizes = values < 0.0f ? -values : values;
        most = sizes > most ? sizes : most;
      }
      scales[g] = largest(most) / MOST;
      float to_q = scales[g] > 1e-30f ? 1.0f / scales[g] : 0.0f;
      Ints total = {};
      for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += LANES) {
        Ints whole = nearest(load(x + i) * to_q);
        Shorts shorts = __builtin_convertvector(whole, Shorts);
        std::memcpy(&q[i], &shorts, sizeof shorts);
        total += whole;
      }
      sums[g] = scales[g] * sum(__builtin_convertvector(total, Floats));
    }
  }
};

// In each lane the product of the low halves plus that of the high ones.
inline Ints dot_of_halves(Words a, Words b) {
#ifdef __AVX2__
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return ((Ints)(a << 16) >> 16) * ((Ints)(b << 16) >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// A tile of weights, [groups], times TOKENS tokens: LANES outputs of each.
template <int BITS, int TOKENS>
inline void dot(const Block<BITS>* tile, const Inputs& x, int64_t first_token, Floats* out) {
  using B = Block<BITS>;
  constexpr int64_t AHEAD = 12;
  int64_t first = first_token * x.groups;
  for (int64_t g = 0; g < x.groups; g++) {
    const B& block = tile[g];
    for (size_t i = 0; i < sizeof block; i += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(tile + g + AHEAD) + i);
    Ints sums[TOKENS] = {};
#pragma GCC unroll 1
    for (int w = 0; w < B::WORDS; w++) {
      Words words = load<Words>(block.words[w]);
#pragma GCC unroll 4
      for (int i = 0; i < B::PAIRS; i++) {
        Words weights = words >> BITS * i & B::FIRST_PAIR;
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
          const int16_t* q = &x.q[(first + t * x.groups + g) * GROUP];
          uint32_t pair;
          std::memcpy(&pair, q + 2 * (w * B::PAIRS + i), sizeof pair);
          sums[t] += dot_of_halves(weights, Words{} + pair);
        }
      }
    }
    Floats scales = load(block.scales), lows = load(block.lows);
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++) {
      int64_t at = first + t * x.groups + g;
      out[t] += __builtin_convertvector(sums[t], Floats) * (scales * x.scales[at]);
      out[t] += lows * x.sums[at];
    }
  }
}

// weights: Block [outputs / LANES, inputs / GROUP], as if outputs were filled up to LANES.
template <int BITS>
void linear(const float* x, const void* weights, const float* bias, float* out, int64_t tokens,
            int64_t inputs, int64_t outputs) {
  constexpr int64_t TILES = 4;  // at a time
  constexpr int TOKENS = 4;
  Inputs all(x, tokens, inputs);
#pragma omp parallel for schedule(dynamic, TILES)
  for (int64_t n = 0; n < outputs; n += LANES) {
    auto* tile = static_cast<const Block<BITS>*>(weights) + n / LANES * all.groups;
    size_t size = std::min(LANES, outputs - n) * sizeof(float);
    for (int64_t first = 0; first < tokens; first += TOKENS) {
      Floats totals[TOKENS] = {};
      int64_t count = std::min<int64_t>(TOKENS, tokens - first);
      if (bias)
        for (Floats& total : totals) std::memcpy(&total, bias + n, size);
      if (count == 1) dot<BITS, 1>(tile, all, first, totals);
      if (count == 2) dot<BITS, 2>(tile, all, first, totals);
      if (count == 3) dot<BITS, 3>(tile, all, first, totals);
      if (count == 4) dot<BITS, 4>(tile, all, first, totals);
      for (int64_t t = 0; t < count; t++) {
        float* to = out + (first + t) * outputs + n;
        if (size == sizeof(Floats))
          store(totals[t], to);
        else
          std::memcpy(to, &totals[t], size);
      }
    }
  }
}

// --- attention -------------------------------------------------------------------------------------

constexpr int64_t TOKENS = 16;  // at a time

struct Row {
  const float *q, *k, *v;
  const int32_t* slots;
  int64_t length, dim, kv_heads, group;  // query heads that share a KV head
  float scale;
  float* out;
};

// Some query heads of a row. scores: [heads, length filled up to LANES], block: [TOKENS, KV heads,
// dim].
void attend(const Row& row, int64_t first_head, int64_t end_head, float* scores, float* block) {
  constexpr int64_t VECTORS = 4;  // that are summed up side by side
  int64_t length = row.length, dim = row.dim, room = (length + LANES - 1) / LANES * LANES;
  int64_t first_kv_head = first_head / row.group, end_kv_head = (end_head - 1) / row.group + 1;
  int64_t size = (end_kv_head - first_kv_head) * dim;
  // K or V of some tokens: memory is quickest line after line, which is not how heads read it.
  auto fetch = [&](const float* cache, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) {
      const float* from = cache + (row.slots[i] * row.kv_heads + first_kv_head) * dim;
      std::memcpy(block + (i - first) * size, from, size * sizeof(float));
    }
  };
  auto of_head = [&](int64_t i, int64_t head) {  // of the block's token i
    return block + i * size + (head / row.group - first_kv_head) * dim;
  };
  for (int64_t first = 0; first < length; first += TOKENS) {
    int64_t end = std::min(first + TOKENS, length);
    fetch(row.k, first, end);
    for (int64_t head = first_head; head < end_head; head++)
      for (int64_t i = first; i < end; i++) {
        const float *q = row.q + head * dim, *k = of_head(i - first, head);
        Floats totals[VECTORS] = {};
        for (int64_t d = 0; d < dim; d += VECTORS * LANES)
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; j++)
            totals[j] += load(q + d + j * LANES) * load(k + d + j * LANES);
        float score = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
        scores[(head - first_head) * room + i] = score * row.scale;
      }
  }
  for (int64_t head = first_head; head < end_head; head++) {
    float *own = scores + (head - first_head) * room, *out = row.out + head * dim;
    float most = *std::max_element(own, own + length);
    std::fill(own + length, own + room, -INFINITY);
    Floats total = {};
    for (int64_t i = 0; i < length; i += LANES) {
      Floats weights = exp(load(own + i) - most);
      store(weights, own + i);
      total += weights;
    }
    for (int64_t i = 0; i < length; i += LANES) store(load(own + i) / sum(total), own + i);
    std::memset(out, 0, dim * sizeof(float));
  }
  for (int64_t first = 0; first < length; first += TOKENS) {
    int64_t end = std::min(first + TOKENS, length);
    fetch(row.v, first, end);
    for (int64_t head = first_head; head < end_head; head++)
      for (int64_t d = 0; d < dim; d += VECTORS * LANES) {
        float* out = row.out + head * dim + d;
        Floats totals[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) totals[j] = load(out + j * LANES);
        for (int64_t i = first; i < end; i++) {
          const float* v = of_head(i - first, head) + d;
          float weight = scores[(head - first_head) * room + i];
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; j++) totals[j] += load(v + j * LANES) * weight;
        }
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store(totals[j], out + j * LANES);
      }
  }
}

}  // namespace

extern "C" {

void linear_int4(const float* x, const void* weights, const float* bias, float* out,
                 int64_t tokens, int64_t inputs, int64_t outputs) {
  linear<4>(x, weights, bias, out, tokens, inputs, outputs);
}

void linear_int8(const float* x, const void* weights, const float* bias, float* out,
                 int64_t tokens, int64_t inputs, int64_t outputs) {
  linear<8>(x, weights, bias, out, tokens, inputs, outputs);
}

// out = norm of total = x + residual. No residual: of x.
void rms_norm(const float* x, const float* residual, const float* weight, float* out, float* total,
              int64_t tokens, int64_t size, float eps) {
#pragma omp parallel for if (tokens >= MANY_TOKENS)
  for (int64_t first = 0; first < tokens * size; first += size) {
    Floats squares = {};
    for (int64_t i = first; i < first + size; i += LANES) {
      Floats values = load(x + i);
      if (residual) {
        values += load(residual + i);
        store(values, total + i);
      }
      store(values, out + i);
      squares += values * values;
    }
    float scale = 1.0f / std::sqrt(sum(squares) / size + eps);
    for (int64_t i = 0; i < size; i += LANES)
      store(load(out + first + i) * scale * load(weight + i), out + first + i);
  }
}

void silu_and_mul(const float* x, float* out, int64_t tokens, int64_t size) {
#pragma omp parallel for if (tokens >= MANY_TOKENS)
  for (int64_t t = 0; t < tokens; t++) {
    const float *gates = x + t * 2 * size, *ups = gates + size;
    for (int64_t i = 0; i < size; i += LANES) {
      Floats gate = load(gates + i);
      store(gate / (1.0f + exp(-gate)) * load(ups + i), out + t * size + i);
    }
  }
}

void rope_and_write_kv(float* qkv, const int32_t* positions, const int32_t* slots,
                       const float* cos_sin, float* k_cache, float* v_cache, int64_t tokens,
                       int64_t q_heads, int64_t kv_heads, int64_t dim) {
  int64_t half = dim / 2, kv_size = kv_heads * dim;
#pragma omp parallel for if (tokens >= MANY_TOKENS)
  for (int64_t t = 0; t < tokens; t++) {
    float* q = qkv + t * (q_heads + 2 * kv_heads) * dim;
    float *k = q + q_heads * dim, *v = k + kv_size;
    const float *cos = cos_sin + positions[t] * dim, *sin = cos + half;
    for (float* head = q; head < v; head += dim)
      for (int64_t i = 0; i < half; i += LANES) {
        Floats first = load(head + i), second = load(head + half + i);
        store(first * load(cos + i) - second * load(sin + i), head + i);
        store(second * load(cos + i) + first * load(sin + i), head + half + i);
      }
    if (slots[t] >= 0) {
      std::memcpy(k_cache + slots[t] * kv_size, k, kv_size * sizeof(float));
      std::memcpy(v_cache + slots[t] * kv_size, v, kv_size * sizeof(float));
    }
  }
}

void decode_attention(const float* q, const float* k_cache, const float* v_cache,
                      const int32_t* slot_table, const int32_t* rows, const int32_t* kv_lens,
                      float* out, int64_t num_rows, int64_t q_heads, int64_t kv_heads, int64_t dim,
                      int64_t q_stride, int64_t table_stride, int64_t window, float scale) {
  // A task has all heads of a row, or those that share a KV head, or one: as many as leave a task
  // for each thread.
  int64_t group = q_heads / kv_heads, threads = omp_get_max_threads();
  int64_t heads = num_rows >= threads ? q_heads : num_rows * kv_heads >= threads ? group : 1;
#pragma omp parallel
  {
    std::vector<float> scores, block(TOKENS * kv_heads * dim);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_rows * q_heads; i += heads) {
      int64_t n = i / q_heads, head = i % q_heads, length = kv_lens[n];
      int64_t seen = window && window < length ? window : length;
      if (!seen) continue;
      if (scores.size() < size_t(heads * (seen + LANES))) scores.resize(heads * (seen + LANES));
      const int32_t* slots = slot_table + rows[n] * table_stride + length - seen;
      Row row = {q + n * q_stride, k_cache, v_cache, slots, seen, dim, kv_heads, group, scale,
                 out + n * q_heads * dim};
      attend(row, head, head + heads, scores.data(), block.data());
    }
  }
}

struct Layer {
  const void *qkv, *o, *gate_up, *down;  // blocks of 4 bits
  const float *input_norm, *post_norm;
  float *k_cache, *v_cache;
  int64_t window;
};

// x, [tokens, hidden]: in, what the first layer gets; out, with `added` the summands of what the last
// one makes.
void decoder_layers(float* x, float* added, const Layer* layers, const int32_t* positions,
                    const int32_t* slots, const float* cos_sin, const int32_t* slot_table,
                    const int32_t* rows, const int32_t* kv_lens, int64_t num_layers,
                    int64_t tokens, int64_t hidden, int64_t inner, int64_t q_heads,
                    int64_t kv_heads, int64_t dim, int64_t table_stride, float eps, float scale) {
  int64_t q_size = q_heads * dim, qkv_size = q_size + 2 * kv_heads * dim;
  std::vector<float> normed_room(tokens * hidden), qkv_room(tokens * qkv_size);
  std::vector<float> attended_room(tokens * q_size);
  std::vector<float> gates_room(tokens * 2 * inner), gated_room(tokens * inner);
  float *normed = normed_room.data(), *qkv = qkv_room.data(), *attended = attended_room.data();
  float *gates = gates_room.data(), *gated = gated_room.data();

  std::memset(added, 0, tokens * hidden * sizeof(float));
  for (const Layer* layer = layers; layer < layers + num_layers; layer++) {
    float *k_cache = layer->k_cache, *v_cache = layer->v_cache;
    rms_norm(added, x, layer->input_norm, normed, x, tokens, hidden, eps);
    linear<4>(normed, layer->qkv, nullptr, qkv, tokens, hidden, qkv_size);
    rope_and_write_kv(qkv, positions, slots, cos_sin, k_cache, v_cache, tokens, q_heads, kv_heads,
                      dim);
    decode_attention(qkv, k_cache, v_cache, slot_table, rows, kv_lens, attended, tokens, q_heads,
                     kv_heads, dim, qkv_size, table_stride, layer->window, scale);
    linear<4>(attended, layer->o, nullptr, added, tokens, q_size, hidden);
    rms_norm(added, x, layer->post_norm, normed, x, tokens, hidden, eps);
    linear<4>(normed, layer->gate_up, nullptr, gates, tokens, hidden, 2 * inner);
    silu_and_mul(gates, gated, tokens, inner);
    linear<4>(gated, layer->down, nullptr, added, tokens, inner, hidden);
  }
}

}  // extern "C"
