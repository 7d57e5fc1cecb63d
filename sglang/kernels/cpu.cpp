// What a step of a few tokens does on a CPU, all in float32. cpu.py says what the arguments are.
// The vectors are GNU C++'s: gcc and clang make of them what the CPU has.

#include <omp.h>

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
using Floats4 [[gnu::vector_size(16)]] = float;
using Halves4 [[gnu::vector_size(8)]] = _Float16;

template <typename Vector>
inline Vector load(const void* at) {
  Vector vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

inline Floats load(const float* at) { return load<Floats>(at); }

inline void store(Floats vector, float* at) { std::memcpy(at, &vector, sizeof vector); }

inline float sum(Floats v) {
  Floats4 low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
  Floats4 four = low + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// 2^n times a Taylor series of e^f, where x = n ln 2 + f. ln 2 is in two parts, of which n times the
// first is exact.
inline Floats exp(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;
  Floats n = x * 1.44269504f;
  Ints whole = __builtin_convertvector(n + (n < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
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

// Some weights of a row: lane j has those of inputs LANES i + j, in a word. A weight is
// q scale + low, with a scale and a low for every 32 inputs.
template <int BITS>
struct [[gnu::packed]] Block {
  static constexpr int PER_WORD = 32 / BITS, GROUPS = PER_WORD / 4, INPUTS = PER_WORD * LANES;
  _Float16 scales[GROUPS], lows[GROUPS];
  uint32_t words[LANES];
};

// Inputs for `dot`. There a q is not shifted out of its word, only masked: as a number it is too
// large by 2^(BITS i), and the input is made as much smaller. But for the last, whose sign bit that
// would be.
template <int BITS>
struct Inputs {
  int64_t size;
  std::vector<float> scaled;  // [tokens, size]
  std::vector<float> sums;    // [tokens, size / 32, LANES]

  Inputs(const float* x, int64_t tokens, int64_t size)
      : size(size), scaled(tokens * size), sums(tokens * size / 4) {
    constexpr int LAST = Block<BITS>::PER_WORD - 1;
    for (int64_t at = 0; at < tokens * size; at += 32) {
      Floats total = {};
      for (int64_t i = at; i < at + 32; i += LANES) {
        int place = i / LANES % (LAST + 1);
        total += load(x + i);
        store(load(x + i) * (place < LAST ? 1.0f / (1u << BITS * place) : 1.0f), &scaled[i]);
      }
      store(total, &sums[at / 4]);
    }
  }
};

// A row of weights times TOKENS tokens.
template <int BITS, int TOKENS>
inline void dot(const Block<BITS>* row, const Inputs<BITS>& x, int64_t token, float bias,
                float* out, int64_t outputs) {
  using B = Block<BITS>;
  const float* scaled = &x.scaled[token * x.size];
  const float* sums = &x.sums[token * x.size / 4];
  Floats totals[TOKENS] = {};
  for (int64_t b = 0; b < x.size / B::INPUTS; b++) {
    Words words = load<Words>(row[b].words);
    float scales[B::GROUPS], lows[B::GROUPS];
    if constexpr (B::GROUPS == 2) {
      Floats4 four = __builtin_convertvector(load<Halves4>(&row[b]), Floats4);
      scales[0] = four[0], scales[1] = four[1], lows[0] = four[2], lows[1] = four[3];
    } else {
      scales[0] = row[b].scales[0], lows[0] = row[b].lows[0];
    }
#pragma GCC unroll 2
    for (int g = 0; g < B::GROUPS; g++) {
      Floats weights[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        int i = 4 * g + j;
        bool is_last = i == B::PER_WORD - 1;
        Words q = is_last ? words >> (32 - BITS) : words & ((1u << BITS) - 1) << BITS * i;
        weights[j] = __builtin_convertvector((Ints)q, Floats);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; t++) {
        int64_t at = t * x.size + b * B::INPUTS + g * 32;
        Floats part = weights[0] * load(scaled + at);
#pragma GCC unroll 3
        for (int j = 1; j < 4; j++) part += weights[j] * load(scaled + at + j * LANES);
        totals[t] += part * scales[g];
        totals[t] += load(sums + at / 4) * lows[g];
      }
    }
  }
  for (int t = 0; t < TOKENS; t++) out[t * outputs] = sum(totals[t]) + bias;
}

template <int BITS>
void linear(const float* x, const void* weights, const float* bias, float* out, int64_t tokens,
            int64_t inputs, int64_t outputs) {
  constexpr int64_t AT_A_TIME = 32;
  Inputs<BITS> all(x, tokens, inputs);
#pragma omp parallel for schedule(dynamic)
  for (int64_t first = 0; first < outputs; first += AT_A_TIME) {
    for (int64_t n = first; n < first + AT_A_TIME && n < outputs; n++) {
      auto* row = static_cast<const Block<BITS>*>(weights) + n * (inputs / Block<BITS>::INPUTS);
      float b = bias ? bias[n] : 0.0f;
      float* to = out + n;
      int64_t t = 0;
      for (; t + 8 <= tokens; t += 8) dot<BITS, 8>(row, all, t, b, to + t * outputs, outputs);
      for (; t + 4 <= tokens; t += 4) dot<BITS, 4>(row, all, t, b, to + t * outputs, outputs);
      for (; t + 2 <= tokens; t += 2) dot<BITS, 2>(row, all, t, b, to + t * outputs, outputs);
      for (; t < tokens; t++) dot<BITS, 1>(row, all, t, b, to + t * outputs, outputs);
    }
  }
}

// --- attention -------------------------------------------------------------------------------------

struct Row {
  const float *q, *k, *v;
  const int32_t* slots;
  int64_t length, dim, kv_heads, group;  // query heads that share a KV head
  float scale;
  float* out;

  int64_t key(int64_t i, int64_t head) const {
    return (slots[i] * kv_heads + head / group) * dim;
  }
};

// Some query heads of a row, block by block of its tokens: a token's K, and V, of all heads lie side
// by side. scores: [heads, length filled up to LANES].
void attend(const Row& row, int64_t first_head, int64_t end_head, float* scores) {
  constexpr int64_t VECTORS = 4;  // that are summed up side by side
  constexpr int64_t BLOCK = 64;
  int64_t length = row.length, dim = row.dim, room = (length + LANES - 1) / LANES * LANES;
  for (int64_t first = 0; first < length; first += BLOCK)
    for (int64_t head = first_head; head < end_head; head++)
      for (int64_t i = first; i < length && i < first + BLOCK; i++) {
        const float *q = row.q + head * dim, *k = row.k + row.key(i, head);
        Floats totals[VECTORS] = {};
        for (int64_t d = 0; d < dim; d += VECTORS * LANES)
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; j++)
            totals[j] += load(q + d + j * LANES) * load(k + d + j * LANES);
        float score = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
        scores[(head - first_head) * room + i] = score * row.scale;
      }
  for (int64_t head = first_head; head < end_head; head++) {
    float *of_head = scores + (head - first_head) * room, *out = row.out + head * dim;
    float most = -INFINITY;
    for (int64_t i = 0; i < length; i++) most = of_head[i] > most ? of_head[i] : most;
    for (int64_t i = length; i < room; i++) of_head[i] = -INFINITY;
    Floats total = {};
    for (int64_t i = 0; i < length; i += LANES) {
      Floats weights = exp(load(of_head + i) - most);
      store(weights, of_head + i);
      total += weights;
    }
    for (int64_t i = 0; i < length; i += LANES) store(load(of_head + i) / sum(total), of_head + i);
    std::memset(out, 0, dim * sizeof(float));
  }
  for (int64_t first = 0; first < length; first += BLOCK)
    for (int64_t head = first_head; head < end_head; head++)
      for (int64_t d = 0; d < dim; d += VECTORS * LANES) {
        float* out = row.out + head * dim + d;
        Floats totals[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) totals[j] = load(out + j * LANES);
        for (int64_t i = first; i < length && i < first + BLOCK; i++) {
          const float* v = row.v + row.key(i, head) + d;
          float weight = scores[(head - first_head) * room + i];
#pragma GCC unroll 4
          for (int j = 0; j < VECTORS; j++) totals[j] += load(v + j * LANES) * weight;
        }
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; j++) store(totals[j], out + j * LANES);
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
  // A task has all heads of a row if there are rows for all threads, else one.
  int64_t heads = num_rows >= omp_get_max_threads() ? q_heads : 1;
#pragma omp parallel
  {
    std::vector<float> scores;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_rows * q_heads; i += heads) {
      int64_t n = i / q_heads, head = i % q_heads, length = kv_lens[n];
      int64_t seen = window && window < length ? window : length;
      if (!seen) continue;
      if (scores.size() < size_t(heads * (seen + LANES))) scores.resize(heads * (seen + LANES));
      const int32_t* slots = slot_table + rows[n] * table_stride + length - seen;
      int64_t group = q_heads / kv_heads;
      Row row = {q + n * q_stride, k_cache, v_cache, slots, seen, dim, kv_heads, group, scale,
                 out + n * q_heads * dim};
      attend(row, head, head + heads, scores.data());
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
