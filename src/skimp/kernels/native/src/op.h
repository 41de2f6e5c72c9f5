// The contract of every native kernel: a plain struct of pointers and sizes in, no PyTorch.
//
// A *program* is an array of pointers to op structs. One call runs the whole program on a
// persistent team of threads with a barrier after every op, so a generation step costs one
// Python call. Buffer sizes are fixed when the program is captured; only StepInfo changes
// between runs, so one program serves every number of rows up to its capacity.
#pragma once
#include <cstddef>
#include <cstdint>

namespace skimp {

// What changes from run to run.
struct StepInfo {
  int32_t rows;        // query tokens in this step, all sequences together
  int32_t num_seqs;    // sequences those rows belong to
  int32_t num_logits;  // rows whose logits are wanted
  // A row's result must not depend on how many rows it is computed with: AMX, whose order of
  // summation differs, is not used.
  int32_t deterministic;
};

enum DType : int32_t { F32 = 0, BF16 = 1 };

// A thread's view of the team while an op runs.
struct Team {
  int tid;
  int size;
  void* scratch;          // per-thread, 64-byte aligned
  size_t scratch_bytes;
  void (*barrier_fn)(void*);
  void* barrier_ctx;
  void* shared;  // one block for the whole team, 64-byte aligned
  size_t shared_bytes;
  void barrier() const { barrier_fn(barrier_ctx); }
};

// Every op struct begins with this.
struct OpHeader {
  int32_t kind;
  int32_t dtype;  // of weights, matrix inputs and cache: F32 or BF16
};

enum OpKind : int32_t {
  OP_EMBED = 1,
  OP_NORM = 2,
  OP_MATMUL = 3,
  OP_ROPE_APPEND = 4,
  OP_ATTEND = 5,
  OP_PACK = 6,
  OP_EXPERTS = 7,
  OP_ADD = 8,
  OP_LATENT_APPEND = 9,
  OP_HEAD_PRODUCTS = 10,
};

// All ops have this signature; work is divided by (team.tid, team.size).
using OpFn = void (*)(const void* op, const StepInfo& step, const Team& team);

// ACT_CLAMPED is not act(gate) * up but (u + 1) * g * sigmoid(act_alpha * g), where g is gate cut
// to act_limit from above and u is up cut to it on both sides.
enum Activation : int32_t {
  ACT_NONE = 0, ACT_SILU = 1, ACT_GELU_TANH = 2, ACT_GELU = 3, ACT_CLAMPED = 4
};

// Weights are stored once, in panels of 16 outputs, and serve every number of rows:
//   BF16 [panels][K padded to 32 / 2][16][2]   one 64-byte line holds a pair of k for 16 outputs,
//                                             which is what VDPBF16PS and an AMX B tile want
//   F32  [panels][K][16]
// In a gated matrix even panels hold 16 gate outputs and odd ones the 16 matching up outputs.
constexpr int PANEL = 16;
constexpr int K_ALIGN = 32;

// Low-bit weights w = (q - zero) * scale lie in panels of 16 outputs too, in lines of 64 bytes:
//   INT8, FP8  [panels][K padded to 8 / 4][16][4]   a byte a weight: q + 128, or the E4M3 bits
//   INT4       [panels][K padded to 8 / 8][16][4]   two weights a byte, q + 8 each
// Of every 8 inputs the words of an output hold (0 2 1 3) and (4 6 5 7), and INT4's one word
// (0 4 1 5) in the low halves of its bytes and (2 6 3 7) in the high ones. So 16-bit lanes, masked
// and shifted step by step, are pairs of neighbours in order, which is what VPDPWSSD wants, and
// bytes are fours for VPDPBUSD. Padding is zero.
enum LowKind : int32_t { LOW_NONE = 0, LOW_INT4 = 1, LOW_INT8 = 2, LOW_FP8 = 3 };
// To what the inputs are rounded, each row with its own scale: amax / 127.5 or amax / 448, as
// compressed-tensors does it. ROUND_NONE leaves the kernels free to use 16-bit fixed point.
enum Rounding : int32_t { ROUND_NONE = 0, ROUND_INT8 = 1, ROUND_FP8 = 2 };
constexpr int LOW_ALIGN = 8;

struct LowBit {
  const void* scales;    // [panels][groups][16] in scale_dtype
  const uint8_t* zeros;  // [panels][groups][16] plus 128 or 8, as the weights; null: symmetric
  int32_t kind;          // LowKind; LOW_NONE: a dense matrix, the rest is not read
  int32_t rounding;
  int32_t scale_dtype;   // F32 or BF16
  int32_t group;         // inputs that share a scale, a multiple of LOW_ALIGN
  int32_t groups;
};

// out[row] = table[ids[row]] * scale
struct EmbedOp {
  OpHeader head;       // dtype of the table
  const int32_t* ids;  // [rows]
  const void* table;   // row-major [V, dim], or panels
  float* out;          // [rows, out_stride]
  int64_t table_stride;  // elements, row-major only
  int64_t out_stride;
  int32_t dim;
  int32_t panels;  // 1: the table is an output matrix's panels (tied embeddings)
  float scale;
  LowBit low;  // else than LOW_NONE only with panels
};

// out = x + y * rsqrt(mean(y^2) + eps) * factor
struct NormOp {
  OpHeader head;
  const float* x;  // null: nothing is added
  const float* y;
  const float* factor;  // [dim]
  float* out;           // may be x
  int64_t x_stride, y_stride, out_stride;
  int32_t dim;
  float eps;
};

// out = epilogue(norm(x) W), in this order: bias, gated activation, softcap, residual.
struct MatmulOp {
  OpHeader head;  // dtype of the weights; of low-bit ones, that of the model's activations
  const void* x;  // [rows, x_stride] in x_dtype
  const float* norm_factor;    // [k] or null: x is used as it is
  const int32_t* row_index;    // row i of the product uses x[row_index[i]]; or null
  const void* panels;
  const float* bias;           // [16 * num_panels] in panel order, or null
  const float* residual;       // [rows, residual_stride] or null; may be out
  void* out;                   // [rows, out_stride] in out_dtype
  void* x_scratch;             // shared, rows * (5 k + 512) bytes, for converted inputs
  int64_t x_stride, residual_stride, out_stride;  // elements
  int32_t x_dtype, out_dtype;
  int32_t k, n;  // n: columns of out (half the packed outputs if gated)
  int32_t num_panels;
  int32_t activation;  // ACT_NONE: plain; else the matrix is gated
  int32_t count;       // 0: StepInfo.rows rows, 1: StepInfo.num_logits
  float norm_eps;
  float softcap;  // 0: none
  float act_alpha, act_limit;
  LowBit low;
};

// Copies a row-major [n, k] matrix into (or, with unpack, out of) panels. Source elements may be
// F32, BF16 or F16 at any alignment. The destination must have been zeroed.
enum SourceDType : int32_t { SRC_F32 = 0, SRC_BF16 = 1, SRC_F16 = 2 };
struct PackOp {
  OpHeader head;  // dtype of the panels
  void* rows;     // row-major side
  void* panels;
  int64_t row_stride;  // elements
  int32_t rows_dtype;  // SourceDType
  int32_t n, k;
  int32_t first;   // packed output that row 0 becomes (plain), or 0
  int32_t layout;  // 0 plain, 1 gate half, 2 up half
  int32_t unpack;
  // LowKind of the panels. Rows of a low-bit matrix are bytes, as QuantizedWeight.values has
  // them, and row_stride counts bytes.
  int32_t low_kind;
};

// Row metadata shared by rope/append and attention; arrays live in buffers that the engine
// rewrites before each run.
struct RowMeta {
  const int32_t* positions;  // [rows] absolute position of each query token
  const int32_t* row_seq;    // [rows] which block-table row it uses
  const int32_t* kv_end;     // [rows] it sees keys with position < kv_end (position + 1 if causal)
  char* arena;               // base of the cache arena, 64-byte aligned
};

// How numbers are stored: in the op's dtype, or as the codes of cache/formats.py.
enum CacheFormat : int32_t { CACHE_DENSE = 0, CACHE_INT8 = 1, CACHE_FP8 = 2, CACHE_INT4 = 3 };

// One memory of a layer's keys and values. Those of a position lie in the page at
//   arena + 64 * block_table[row_seq][position / page_tokens] + layer_offset
// where keys are [kv_heads, page_tokens / 16] blocks of 16 tokens and values follow likewise.
// Blocks hold no padding. Dense ones lie in the products' operand form, so that attention
// transposes and interleaves nothing:
//   keys    F32  [head_dim][16]         values  F32  [16][head_dim]
//           BF16 [head_dim / 2][16][2]          BF16 [8][head_dim][2], pairs of tokens
//           and for an odd head_dim the last dimension as [16]
// Those of codes are keys [bytes][16] and values [16][bytes], where a vector's bytes are head_dim
// codes, or head_dim / 2 of INT4: dimension i low, i + head_dim / 2 high. After all blocks follow
// the scales, bfloat16 [keys, values][kv_heads][page_tokens].
// Slots that were never written hold arbitrary bytes; no visible number depends on them.
struct CachePages {
  const int32_t* block_table;  // [num_seqs, table_stride] page address in 64-byte units
  int64_t table_stride;
  int64_t layer_offset;  // bytes from the start of the page
  int32_t format;        // CacheFormat
  int32_t page_tokens;   // a multiple of 16
};

// Latents (kernels/latent.py) are cached as keys of one kv head, without values: the normed latent,
// then the rotated key, latent_dim + rope_dim numbers.
//
// A step's rows of a sequence attend in either of two forms. *Absorbed*, queries are brought to the
// latent, where keys and values are the latents themselves. *Expanded*, every head's keys and
// values are made of the latents seen, a span at a time.
enum LatentForm : int32_t { LATENT_NONE = 0, LATENT_ABSORBED = 1, LATENT_EXPANDED = 2 };

struct LatentSizes {
  int32_t latent_dim, rope_dim;
  int32_t nope_dim, value_dim;  // of a head
  int32_t expand_rows;  // fewer rows of a sequence are never expanded; 0: none are
};

// QK-norm, RoPE and the Hadamard turn of queries (in place), keys and values; the latter two are
// then written to `cache`, and to `recent` where that has a block table.
struct RopeAppendOp {
  OpHeader head;
  RowMeta meta;
  CachePages cache;
  CachePages recent;     // always dense
  float* qkv;            // [rows, qkv_stride]: q heads, k heads, v heads; all are overwritten
  int64_t qkv_stride;
  const float* q_norm;   // [head_dim] or null
  const float* k_norm;
  const float* cos;      // [max_positions, rotary_dim / 2] or null (no rope)
  const float* sin;
  float norm_eps;
  int32_t num_heads, num_kv_heads, head_dim, rotary_dim, interleaved;
  int32_t hadamard;      // 1: turn queries, keys and values
};

// Norm of latents, RoPE of their keys and of queries, and the append to the cache.
struct LatentAppendOp {
  OpHeader head;
  RowMeta meta;
  CachePages cache;
  float* queries;        // [rows, q_stride]: of each head nope_dim, then rope_dim, rotated in place
  int64_t q_stride;
  float* absorbed;       // [rows, absorbed_stride]: of each head latent_dim, which are left alone,
  int64_t absorbed_stride;  // then a copy of what was rotated
  const float* latents;  // [rows, latents_stride]: latent_dim, then rope_dim
  int64_t latents_stride;
  const float* norm;     // [latent_dim]
  const float* cos;      // [max_positions, rotary_dim / 2] or null (no rope)
  const float* sin;
  float norm_eps;
  int32_t num_heads, rotary_dim, interleaved;
  LatentSizes sizes;
};

// A product for each head, of the rows that are absorbed.
struct HeadProductsOp {
  OpHeader head;
  RowMeta meta;
  const MatmulOp* product;   // of the first head; the panels of the others follow
  int64_t x_step, out_step;  // elements from head to head
  int32_t num_heads;
  LatentSizes sizes;
};

struct AttendOp {
  OpHeader head;
  RowMeta meta;
  CachePages cache;
  CachePages recent;     // without a block table: none
  const float* q;        // [rows, q_stride], rotated queries
  int64_t q_stride;
  void* out;             // [rows, out_stride] in head.dtype: attention output, heads side by side
  int64_t out_stride;
  const float* sinks;    // [num_heads] or null
  float scale;
  float softcap;         // 0: none
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t window;        // 0: whole past; else keys with position > row position - window
  int32_t recent_tokens; // keys with position > row position - recent_tokens are read in `recent`
  int32_t hadamard;      // 1: turn the result back
  // LatentForm of the rows to compute. head_dim is that of queries; those absorbed have
  // num_kv_heads groups of heads, which all read the same latents, and outputs of latent_dim.
  int32_t latent;
  LatentSizes sizes;
  const void* made;      // expanded: [num_heads][nope_dim + value_dim][latent_dim] in head.dtype
};

// out = sum over a row's experts, in ascending order, of weight * down(gate_up(row)). The products
// are run on the pairs of each expert: their `out` is a buffer of a row a pair, in the order of the
// groups, and so is the `x` of down; `row_index` is set here.
struct ExpertsOp {
  OpHeader head;
  const float* logits;      // [rows, logits_stride], of the router
  const float* correction;  // [num_experts] or null
  const MatmulOp* const* gate_up;  // [num_experts]
  const MatmulOp* const* down;     // [num_experts]
  const float* y;    // the `out` of down
  float* out;        // [rows, out_stride]
  int32_t* chosen;   // [rows * per_token]
  float* weights;    // [rows * per_token]
  int32_t* places;   // [rows * per_token]: where each pair lies in its group
  int32_t* sources;  // [rows * per_token]: the row of each place
  int32_t* starts;   // [num_experts + 1]: first place of each group
  int64_t logits_stride, y_stride, out_stride;
  int32_t num_experts, per_token, dim;
  int32_t sigmoid;   // 0: softmax over all experts
  int32_t groups, groups_chosen;
  int32_t top2;      // a group counts as the sum of its best two; 0: as its best
  int32_t normalize;
  float normalize_eps;
  float scale;
};

// x += scale * y
struct AddOp {
  OpHeader head;
  float* x;
  const float* y;
  int64_t x_stride, y_stride;
  int32_t dim;
  float scale;
};

void run_embed(const void* op, const StepInfo& step, const Team& team);
void run_norm(const void* op, const StepInfo& step, const Team& team);
void run_matmul(const void* op, const StepInfo& step, const Team& team);
void run_rope_append(const void* op, const StepInfo& step, const Team& team);
void run_attend(const void* op, const StepInfo& step, const Team& team);
void run_pack(const void* op, const StepInfo& step, const Team& team);
void run_experts(const void* op, const StepInfo& step, const Team& team);
void run_add(const void* op, const StepInfo& step, const Team& team);
void run_latent_append(const void* op, const StepInfo& step, const Team& team);
void run_head_products(const void* op, const StepInfo& step, const Team& team);

}  // namespace skimp
