// torch.ops.socpo.linear_sample: a work item is a tile of the vocabulary for a block of rows. Its
// logits stay in L2, where every draw of these rows reads them; the logits of rows with filtered
// draws are also copied into whole rows.

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "linear.h"
#include "sample.h"

namespace socpo {
namespace {

// Draws in the order of their rows and temperatures; of draws alike in both, the exps are taken
// once.
struct DrawsOfRows {
  std::vector<int64_t> order;  // of the draws
  std::vector<int64_t> rows;   // distinct rows of hidden, ascending
  std::vector<int64_t> begin;  // order[begin[i]] to order[begin[i + 1]] are the draws of rows[i]
  std::vector<int64_t> kept_slot;  // of rows[i] among the rows with filtered draws, or -1
  int64_t num_kept = 0;

  DrawsOfRows(const std::vector<DrawSettings>& settings, const int64_t* row_of_draw)
      : order(settings.size()) {
    std::iota(order.begin(), order.end(), 0);
    const auto row_of = [&](int64_t draw) {
      return row_of_draw == nullptr ? draw : row_of_draw[draw];
    };
    const auto key = [&](int64_t draw) {
      return std::make_tuple(row_of(draw), settings[draw].inverse_temperature);
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return key(a) < key(b); });
    for (size_t i = 0; i < order.size(); ++i) {
      if (rows.empty() || rows.back() != row_of(order[i])) {
        rows.push_back(row_of(order[i]));
        begin.push_back(i);
        kept_slot.push_back(-1);
      }
      if (settings[order[i]].is_filtered() && kept_slot.back() < 0) kept_slot.back() = num_kept++;
    }
    begin.push_back(order.size());
  }
};

std::vector<Drawn> draw_all(const at::Tensor& hidden, const at::Tensor& weight,
                            const std::vector<DrawSettings>& settings, const int64_t* row_of_draw) {
  const int64_t vocab = weight.size(0), width = weight.size(1), num_tiles = num_tiles_of(vocab);
  const DrawsOfRows draws(settings, row_of_draw);
  const int64_t num_rows = draws.rows.size();
  std::vector<float> x(num_rows * width), kept(draws.num_kept * vocab);
  for (int64_t i = 0; i < num_rows; ++i)
    std::copy_n(hidden.const_data_ptr<float>() + draws.rows[i] * hidden.stride(0), width,
                x.begin() + i * width);
  std::vector<TileDraw> tiles(settings.size() * num_tiles);
  const char* weight_p = static_cast<const char*>(weight.const_data_ptr());
  const RowBlocks blocks(x.data(), width, num_rows, width);
  const int64_t num_blocks = blocks.num_blocks();
  const auto draw_from_tile = [&](int64_t item, RowBlocks& own) {
    const int64_t tile = item / num_blocks;
    const int64_t first_id = tile * SAMPLE_TILE;
    const int64_t first_row = own.first_row(item % num_blocks);
    const int64_t count = std::min<int64_t>(SAMPLE_TILE, vocab - first_id);
    thread_local std::vector<float> logits;
    LinearBlock block = own.block(item % num_blocks);
    if (logits.size() < size_t(block.num_rows * SAMPLE_TILE))
      logits.resize(block.num_rows * SAMPLE_TILE);
    block.weight = weight_p + first_id * width * weight.element_size();
    block.is_bf16 = weight.element_size() == 2;
    block.num_outs = count;
    block.out = logits.data();
    block.out_stride = SAMPLE_TILE;
    kernels().linear_block(block);
    for (int64_t row = first_row; row < first_row + block.num_rows; ++row) {
      const float* from = logits.data() + (row - first_row) * SAMPLE_TILE;
      if (draws.kept_slot[row] >= 0)
        std::copy_n(from, count, kept.begin() + draws.kept_slot[row] * vocab + first_id);
      float weights[SAMPLE_TILE];
      TileDraw sums{};
      float summed = -1;  // the inverse temperature of weights and sums
      for (int64_t i = draws.begin[row]; i < draws.begin[row + 1]; ++i) {
        const DrawSettings& draw = settings[draws.order[i]];
        if (draw.is_filtered()) continue;
        if (draw.inverse_temperature != summed)
          sums = sum_tile(from, count, draw.inverse_temperature, weights);
        summed = draw.inverse_temperature;
        TileDraw& to = tiles[draws.order[i] * num_tiles + tile] = sums;
        pick_token(from, weights, first_id, count, draw, to);
      }
    }
  };
  const int64_t num_items = num_tiles * num_blocks;
  for_each_range(
      num_items, num_items, [&] { return blocks; },
      [&](int64_t begin, int64_t end, RowBlocks& own) {
        for (int64_t item = begin; item < end; ++item) draw_from_tile(item, own);
      });
  std::vector<Drawn> drawn(settings.size());
  for_each_item(settings.size(), [&](int64_t i) {
    const int64_t draw = draws.order[i];
    const int64_t row =
        std::upper_bound(draws.begin.begin(), draws.begin.end(), i) - draws.begin.begin() - 1;
    drawn[draw] = settings[draw].is_filtered()
                      ? draw_row(kept.data() + draws.kept_slot[row] * vocab, vocab, settings[draw])
                      : merge_tiles(tiles.data() + draw * num_tiles, num_tiles, settings[draw]);
  });
  return drawn;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_sample(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& row_keys,
    const at::Tensor& temperature, const at::Tensor& top_k, const at::Tensor& top_p,
    const at::Tensor& min_p, const std::optional<at::Tensor>& rows) {
  const int64_t num_draws = row_keys.size(0);
  const auto options = row_keys.options();
  at::Tensor token_ids = at::empty({num_draws}, options);
  at::Tensor logprobs = at::empty({num_draws}, options.dtype(at::kFloat));
  at::Tensor entropy = at::empty_like(logprobs), kept_mass = at::empty_like(logprobs);
  const at::Tensor row_of_draw = rows ? rows->contiguous() : at::Tensor();
  const auto settings = read_settings(row_keys.contiguous(), temperature.contiguous(),
                                      top_k.contiguous(), top_p.contiguous(), min_p.contiguous());
  const auto drawn =
      draw_all(hidden.stride(1) == 1 ? hidden : hidden.contiguous(), weight.contiguous(), settings,
               row_of_draw.defined() ? row_of_draw.const_data_ptr<int64_t>() : nullptr);
  int64_t* token_ids_p = token_ids.mutable_data_ptr<int64_t>();
  float* logprobs_p = logprobs.mutable_data_ptr<float>();
  float* entropy_p = entropy.mutable_data_ptr<float>();
  float* kept_mass_p = kept_mass.mutable_data_ptr<float>();
  for (int64_t b = 0; b < num_draws; ++b) {
    token_ids_p[b] = drawn[b].token_id;
    logprobs_p[b] = drawn[b].logprob;
    entropy_p[b] = drawn[b].entropy;
    kept_mass_p[b] = drawn[b].kept_mass;
  }
  return {token_ids, logprobs, entropy, kept_mass};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_sample_meta(
    const at::Tensor& hidden, const at::Tensor&, const at::Tensor& row_keys, const at::Tensor&,
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&) {
  const auto numbers = [&] { return at::empty_symint({row_keys.sym_size(0)}, hidden.options()); };
  return {at::empty_symint({row_keys.sym_size(0)}, row_keys.options()), numbers(), numbers(),
          numbers()};
}

}  // namespace

TORCH_LIBRARY_IMPL(socpo, CPU, m) { m.impl("linear_sample", linear_sample); }
TORCH_LIBRARY_IMPL(socpo, Meta, m) { m.impl("linear_sample", linear_sample_meta); }

}  // namespace socpo
