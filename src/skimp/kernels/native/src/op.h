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
  void* shared = nullptr;  // one block for the whole team, 64-byte aligned; may be missing
  size_t shared_bytes = 0;
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
};

// All ops have this signature; work is divided by (team.tid, team.size).
using OpFn = void (*)(const void* op, const StepInfo& step, const Team& team);

// Row metadata shared by rope/append and attention; arrays live in buffers that the engine
// rewrites before each run.
struct RowMeta {
  const int32_t* positions;  // [rows] absolute position of each query token
  const int32_t* row_seq;    // [rows] which block-table row it uses
  const int32_t* kv_end;     // [rows] it sees keys with position < kv_end (position + 1 if causal)
  const int32_t* block_table;  // [num_seqs, table_stride] page address in 64-byte units
  int64_t table_stride;
  char* arena;                 // base of the cache arena, 64-byte aligned
};

// After QK-norm and RoPE, keys and values of each row go to page
//   arena + 64 * block_table[row_seq][position / page_tokens] + layer_offset
// where keys are [kv_heads, page_tokens, head_dim] and values follow in the same shape.
struct RopeAppendOp {
  OpHeader head;
  RowMeta meta;
  float* qkv;            // [rows, qkv_stride]: q heads, k heads, v heads; q is rotated in place
  int64_t qkv_stride;
  const float* q_norm;   // [head_dim] or null
  const float* k_norm;
  const float* cos;      // [max_positions, rotary_dim / 2] or null (no rope)
  const float* sin;
  int64_t layer_offset;  // bytes from the start of the page
  float norm_eps;
  int32_t num_heads, num_kv_heads, head_dim, rotary_dim, interleaved, page_tokens;
};

struct AttendOp {
  OpHeader head;
  RowMeta meta;
  const float* q;        // [rows, q_stride], rotated queries
  int64_t q_stride;
  void* out;             // [rows, out_stride] in head.dtype: attention output, heads side by side
  int64_t out_stride;
  const float* sinks;    // [num_heads] or null
  int64_t layer_offset;
  float scale;
  float softcap;         // 0: none
  int32_t num_heads, num_kv_heads, head_dim, page_tokens;
  int32_t window;        // 0: whole past; else keys with position > row position - window
};

}  // namespace skimp
