// The convolutions of clric's image decoders (`small`, `lite`) in WebAssembly SIMD.
//
// Every layer is a 3 x 3 convolution with zero padding, computed as Winograd F(2 x 2, 3 x 3) in integers: weights are the
// shipped int8 ones (int16 for a layer that is shipped in single precision), exactly; activations are rounded to 14 bits
// of the largest magnitude in their tensor. Tensors between layers are single precision, in the order row, column,
// channel, without borders. What is left of rounding is far below one grey level.
//
// Winograd: out = A^T ((4 G g G^T) * (B^T d B)) A / 4 for a tile d of 4 x 4 inputs, g the kernel. Sums wrap around modulo
// 2^32, which does no harm as long as the result itself fits: `largest_input` sees to that.

#include <stdint.h>
#include <wasm_simd128.h>

enum { RELU = 1, SHUFFLE = 2, IMAGE = 4 };

// A sum of four rounded activations must fit into 16 bits.
#define LARGEST_ACTIVATION 8191

// One layer. `kernels` is filled in by `prepare`; the rest by the caller.
typedef struct {
  int32_t inputs, outputs, flags; // both counts are multiples of 8
  const float *scales;            // one for each output: real weight = weight * scale
  const float *biases;
  int16_t *kernels;               // [outputs / 8][16 positions][inputs / 2][8 outputs][2 inputs]
  float largest_input;            // how large a rounded activation may be
} Layer;

// Transforms the kernels of a layer: weights[outputs][inputs][3][3] of 1 or 2 bytes each.
__attribute__((export_name("prepare"))) void prepare(Layer *layer, const void *weights, int bytes_each) {
  int64_t largest_sum = 1;
  for (int o = 0; o < layer->outputs; o++) {
    int64_t sum = 0;
    for (int i = 0; i < layer->inputs; i++) {
      int32_t g[9], rows[12];
      for (int n = 0; n < 9; n++) {
        int at = (o * layer->inputs + i) * 9 + n;
        g[n] = bytes_each == 1 ? ((const int8_t *)weights)[at] : ((const int16_t *)weights)[at];
        sum += g[n] < 0 ? -g[n] : g[n];
      }
      for (int x = 0; x < 3; x++) {
        int32_t a = g[x], b = g[3 + x], c = g[6 + x];
        rows[x] = 2 * a, rows[3 + x] = a + b + c, rows[6 + x] = a - b + c, rows[9 + x] = 2 * c;
      }
      for (int y = 0; y < 4; y++) {
        int32_t a = rows[3 * y], b = rows[3 * y + 1], c = rows[3 * y + 2];
        int32_t u[4] = {2 * a, a + b + c, a - b + c, 2 * c};
        for (int x = 0; x < 4; x++) {
          int block = (o / 8 * 16 + 4 * y + x) * (layer->inputs / 2) + i / 2;
          layer->kernels[block * 16 + o % 8 * 2 + i % 2] = (int16_t)u[x];
        }
      }
    }
    if (sum > largest_sum) largest_sum = sum;
  }
  int64_t limit = INT32_MAX / (4 * largest_sum);
  layer->largest_input = (float)(limit < LARGEST_ACTIVATION ? limit : LARGEST_ACTIVATION);
}

// Rounds one row of activations into row[columns][inputs], of which the first and all beyond `width` are padding. A row
// outside of the image is 0.
static void round_row(const float *from, int16_t *row, int width, int columns, int inputs, float factor) {
  v128_t zero = wasm_i32x4_splat(0), by = wasm_f32x4_splat(factor);
  for (int i = 0; i < columns * inputs; i += 8) {
    int at = i - inputs;
    v128_t rounded = zero;
    if (from && at >= 0 && at < width * inputs) {
      v128_t low = wasm_f32x4_nearest(wasm_f32x4_mul(wasm_v128_load(from + at), by));
      v128_t high = wasm_f32x4_nearest(wasm_f32x4_mul(wasm_v128_load(from + at + 4), by));
      rounded = wasm_i16x8_narrow_i32x4(wasm_i32x4_trunc_sat_f32x4(low), wasm_i32x4_trunc_sat_f32x4(high));
    }
    wasm_v128_store(row + i, rounded);
  }
}

// B^T d B of all tiles of a row, from four rows of rounded activations: v[tile][16 positions][inputs].
static void transform_inputs(int16_t *const rows[4], int16_t *v, int tiles, int inputs) {
  for (int tile = 0; tile < tiles; tile++) {
    for (int i = 0; i < inputs; i += 8) {
      v128_t t[4][4];
      for (int x = 0; x < 4; x++) {
        int at = (2 * tile + x) * inputs + i;
        v128_t a = wasm_v128_load(rows[0] + at), b = wasm_v128_load(rows[1] + at);
        v128_t c = wasm_v128_load(rows[2] + at), d = wasm_v128_load(rows[3] + at);
        t[0][x] = wasm_i16x8_sub(a, c), t[1][x] = wasm_i16x8_add(b, c);
        t[2][x] = wasm_i16x8_sub(c, b), t[3][x] = wasm_i16x8_sub(b, d);
      }
      int16_t *to = v + tile * 16 * inputs + i;
      for (int y = 0; y < 4; y++) {
        wasm_v128_store(to + (4 * y + 0) * inputs, wasm_i16x8_sub(t[y][0], t[y][2]));
        wasm_v128_store(to + (4 * y + 1) * inputs, wasm_i16x8_add(t[y][1], t[y][2]));
        wasm_v128_store(to + (4 * y + 2) * inputs, wasm_i16x8_sub(t[y][2], t[y][1]));
        wasm_v128_store(to + (4 * y + 3) * inputs, wasm_i16x8_sub(t[y][1], t[y][3]));
      }
    }
  }
}

// Products of four tiles with the kernels of eight outputs at one position: m[tile][2] of four sums each.
static inline void multiply(const int16_t *v, int tile_step, const int16_t *kernels, int inputs, v128_t *m, int m_step) {
  v128_t s0 = wasm_i32x4_splat(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  const int16_t *v1 = v + tile_step, *v2 = v1 + tile_step, *v3 = v2 + tile_step;
  for (int i = 0; i < inputs; i += 2, kernels += 16) {
    v128_t a = wasm_v128_load(kernels), b = wasm_v128_load(kernels + 8), x;
    x = wasm_v128_load32_splat(v + i);
    s0 = wasm_i32x4_add(s0, wasm_i32x4_dot_i16x8(x, a)), s1 = wasm_i32x4_add(s1, wasm_i32x4_dot_i16x8(x, b));
    x = wasm_v128_load32_splat(v1 + i);
    s2 = wasm_i32x4_add(s2, wasm_i32x4_dot_i16x8(x, a)), s3 = wasm_i32x4_add(s3, wasm_i32x4_dot_i16x8(x, b));
    x = wasm_v128_load32_splat(v2 + i);
    s4 = wasm_i32x4_add(s4, wasm_i32x4_dot_i16x8(x, a)), s5 = wasm_i32x4_add(s5, wasm_i32x4_dot_i16x8(x, b));
    x = wasm_v128_load32_splat(v3 + i);
    s6 = wasm_i32x4_add(s6, wasm_i32x4_dot_i16x8(x, a)), s7 = wasm_i32x4_add(s7, wasm_i32x4_dot_i16x8(x, b));
  }
  m[0] = s0, m[1] = s1, m[m_step] = s2, m[m_step + 1] = s3;
  m[2 * m_step] = s4, m[2 * m_step + 1] = s5, m[3 * m_step] = s6, m[3 * m_step + 1] = s7;
}

// A^T m A of one tile and four outputs; m has a step of two vectors between positions.
static inline void transform_output(const v128_t *m, v128_t out[4]) {
  v128_t t[2][4];
  for (int x = 0; x < 4; x++) {
    v128_t a = m[2 * x], b = m[2 * (4 + x)], c = m[2 * (8 + x)], d = m[2 * (12 + x)];
    t[0][x] = wasm_i32x4_add(wasm_i32x4_add(a, b), c);
    t[1][x] = wasm_i32x4_sub(wasm_i32x4_sub(b, c), d);
  }
  for (int y = 0; y < 2; y++) {
    out[2 * y] = wasm_i32x4_add(wasm_i32x4_add(t[y][0], t[y][1]), t[y][2]);
    out[2 * y + 1] = wasm_i32x4_sub(wasm_i32x4_sub(t[y][1], t[y][2]), t[y][3]);
  }
}

// One layer: in (height x width x inputs) -> out. `largest` is the largest magnitude in `in`; that in `out` is returned.
// `added`, where there is one, is added to the output, and may be `out` itself.
//   SHUFFLE: outputs are four groups, one for each of 2 x 2 pixels; out is twice as high and wide, with a quarter of the
//            channels.
//   IMAGE: as SHUFFLE, with groups of R, G, B, A in grey levels: out is of bytes, with `image_step` bytes from row to row.
// `scratch` holds scratch_size(width, inputs) bytes.
__attribute__((export_name("convolve"))) float convolve(const Layer *layer, const float *in, float largest, int height,
                                                        int width, const float *added, float *out, int image_step,
                                                        int16_t *scratch) {
  int inputs = layer->inputs, outputs = layer->outputs, flags = layer->flags;
  int tiles = (width + 1) / 2, columns = 2 * tiles + 2;
  float factor = largest > 0 ? layer->largest_input / largest : 1;
  v128_t unit = wasm_f32x4_splat(0.25f / factor), zero = wasm_f32x4_splat(0), peak = zero;
  int16_t *rows[4], *v = scratch + 4 * columns * inputs;
  for (int y = 0; y < 4; y++) rows[y] = scratch + y * columns * inputs;
  int group = flags & (SHUFFLE | IMAGE) ? outputs / 4 : outputs;

  for (int top = 0; top < height; top += 2) {
    if (top == 0) {
      round_row(0, rows[0], width, columns, inputs, factor);
      round_row(in, rows[1], width, columns, inputs, factor);
    } else {
      int16_t *first = rows[0], *second = rows[1];
      rows[0] = rows[2], rows[1] = rows[3], rows[2] = first, rows[3] = second;
    }
    for (int y = 1; y < 3; y++) {
      const float *from = top + y < height ? in + (top + y) * width * inputs : 0;
      round_row(from, rows[y + 1], width, columns, inputs, factor);
    }
    transform_inputs(rows, v, tiles, inputs);

    for (int o = 0; o < outputs; o += 8) {
      const int16_t *kernels = layer->kernels + o * 16 * inputs;
      for (int first = 0; first < tiles; first += 4) {
        v128_t m[4 * 32];
        for (int position = 0; position < 16; position++) {
          multiply(v + (first * 16 + position) * inputs, 16 * inputs, kernels + position * 8 * inputs, inputs,
                   m + 2 * position, 32);
        }
        int count = tiles - first < 4 ? tiles - first : 4;
        for (int half = 0; half < 2; half++) {
          int channel = o + 4 * half;
          v128_t scale = wasm_f32x4_mul(wasm_v128_load(layer->scales + channel), unit);
          v128_t bias = wasm_v128_load(layer->biases + channel);
          for (int n = 0; n < count; n++) {
            v128_t sums[4];
            transform_output(m + 32 * n + half, sums);
            for (int k = 0; k < 4; k++) {
              int y = top + k / 2, x = 2 * (first + n) + k % 2;
              if (y >= height || x >= width) continue;
              v128_t value = wasm_f32x4_add(wasm_f32x4_mul(wasm_f32x4_convert_i32x4(sums[k]), scale), bias);
              if (flags & IMAGE) {
                int part = channel / 4;
                v128_t grey = wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_add(value, wasm_f32x4_splat(0.5f)));
                grey = wasm_i16x8_narrow_i32x4(grey, grey);
                grey = wasm_u8x16_narrow_i16x8(grey, grey);
                uint8_t *pixel = (uint8_t *)out + (2 * y + part / 2) * image_step + (2 * x + part % 2) * 4;
                wasm_v128_store32_lane(pixel, grey, 0);
                continue;
              }
              int at = (y * width + x) * outputs + channel;
              if (flags & SHUFFLE) {
                int part = channel / group;
                at = ((2 * y + part / 2) * 2 * width + 2 * x + part % 2) * group + channel % group;
              }
              if (added) value = wasm_f32x4_add(value, wasm_v128_load(added + at));
              if (flags & RELU) value = wasm_f32x4_max(value, zero);
              peak = wasm_f32x4_pmax(peak, wasm_f32x4_abs(value));
              wasm_v128_store(out + at, value);
            }
          }
        }
      }
    }
  }
  peak = wasm_f32x4_max(peak, wasm_i32x4_shuffle(peak, peak, 2, 3, 0, 1));
  peak = wasm_f32x4_max(peak, wasm_i32x4_shuffle(peak, peak, 1, 0, 3, 2));
  return wasm_f32x4_extract_lane(peak, 0);
}

// Bytes of scratch memory for a layer: four rounded rows, and a row of transformed tiles, in fours.
__attribute__((export_name("scratch_size"))) int scratch_size(int width, int inputs) {
  int tiles = (width + 1) / 2;
  return (4 * (2 * tiles + 2) + 16 * ((tiles + 3) / 4 * 4)) * inputs * 2;
}
