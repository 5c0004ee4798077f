#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "experiments/commands/commands.h"
#include "suites/evaluate.h"
#include "suites/loglikelihood.h"
#include "suites/prompt.h"

namespace mixlora {
namespace {

struct PromptsArguments {
  std::string suite, protocol = "label-token", out, row, model = "models/smollm2-135m";
  ProtocolSpec spec;
  std::int64_t count = 3;
  bool official = false, tokens = false;
};

/// A row's requests as pairs; label-token: the prompt with each label string.
std::vector<TextPair> pairs_of(const Task& task, const Row& row, const ProtocolSpec& spec,
                               const std::string& few_shot) {
  std::vector<TextPair> pairs;
  if (spec.protocol == Protocol::loglikelihood) {
    pairs = choice_texts(task, row);
    for (TextPair& p : pairs) p.context.insert(0, few_shot);
  } else {
    const std::string prompt = prompt_text(task, row, spec);
    for (const auto& label : label_texts(task, row, spec)) pairs.push_back({prompt, label});
  }
  return pairs;
}

Json gold_of(const Task& task, const Row& row, const ProtocolSpec& spec) {
  if (spec.protocol == Protocol::loglikelihood) return row.answer;
  return label_texts(task, row, spec)[static_cast<std::size_t>(gold_label(task, row, spec))];
}

Json request_line(const Task& task, const Row& row, const ProtocolSpec& spec,
                  const std::string& few_shot) {
  Json requests = Json::array();
  for (const TextPair& p : pairs_of(task, row, spec, few_shot))
    requests.push_back({{"context", p.context}, {"continuation", p.continuation}});
  return {{"id", row.id}, {"requests", requests}, {"gold", gold_of(task, row, spec)}};
}

/// Each token in bars, what is scored after "||".
void print_tokens(const Tokenizer& tokenizer, const ScoredText& t) {
  std::string line;
  for (std::size_t i = 0; i < t.tokens.size(); ++i)
    line += (i == static_cast<std::size_t>(t.scored_from) ? " || "
             : i == 0                                     ? ""
                                                          : "|") +
            tokenizer.token(t.tokens[i]);
  fmt::print("{} tokens, {} scored: {}\n", t.tokens.size(),
             t.tokens.size() - static_cast<std::size_t>(t.scored_from), line);
}

void print_row(const Task& task, const Row& row, const PromptsArguments& o,
               const std::string& few_shot, const Tokenizer* tokenizer) {
  fmt::print("--- {} (gold: {})\n", row.id, gold_of(task, row, o.spec).dump());
  const auto pairs = pairs_of(task, row, o.spec, few_shot);
  const bool labels = o.spec.protocol == Protocol::label_token;
  for (std::size_t i = 0; i < pairs.size(); ++i) {
    if (labels && i > 0) break;  // one prompt for all labels
    fmt::print("{}{}\n", pairs[i].context,
               labels ? "" : fmt::format("[{}]", pairs[i].continuation));
  }
  if (tokenizer == nullptr) return;
  bool cut = false;
  for (const TextPair& p : pairs)
    print_tokens(*tokenizer, encode_pair(labels ? TextPair{p.context, " " + p.continuation} : p,
                                         *tokenizer, o.spec.bos, 0, cut));
}

int prompts(PromptsArguments o) {
  read(Json(o.protocol), o.spec.protocol, "--protocol");
  o.spec.label_rule = o.official ? LabelRule::official : LabelRule::corrected;
  check(o.spec, "prompts");
  const Task task = find_task(o.suite);
  const std::string few_shot = few_shot_of(task, o.spec);
  const bool all = !o.out.empty() || !o.row.empty();
  Dataset data = load_split(task, false, all ? 0 : o.count);
  if (!o.row.empty()) {
    std::erase_if(data.rows, [&](const Row& r) { return r.id != o.row; });
    require(!data.rows.empty(), "{}: no row \"{}\"", data.file, o.row);
  }
  if (!o.out.empty()) {
    std::string text;
    for (const Row& row : data.rows)
      text += request_line(task, row, o.spec, few_shot).dump() + "\n";
    write_text(o.out, text);
    fmt::print("{} rows of {} in {}\n", data.rows.size(), task.name, o.out);
    return kDone;
  }
  std::unique_ptr<Tokenizer> tokenizer;
  if (o.tokens) tokenizer = std::make_unique<Tokenizer>(o.model);
  for (const Row& row : data.rows) print_row(task, row, o, few_shot, tokenizer.get());
  return kDone;
}

}  // namespace

void add_prompts_command(CLI::App& app, int& exit_code) {
  const auto o = std::make_shared<PromptsArguments>();  // the parser and the callback share it
  CLI::App* command = app.add_subcommand("prompts", "print or write what a suite asks");
  command->add_option("suite", o->suite, "a task, its JSON file, or a file of rows")->required();
  command->add_option("--protocol", o->protocol, "label-token or loglikelihood");
  command->add_option("--out", o->out, "write every request as JSON lines");
  command->add_option("--row", o->row, "only the row of this id");
  command->add_option("-n", o->count, "how many rows to print");
  command->add_option("--few-shot", o->spec.few_shot, "loglikelihood: solved examples first");
  command->add_flag("--official", o->official, "label-token: MoE-PEFT's label rule");
  command->add_flag("--passage", o->spec.boolq_passage, "label-token: BoolQ's passage first");
  command->add_flag("--tokens", o->tokens, "show token boundaries, and what is scored");
  command->add_option("--model", o->model, "whose tokenizer --tokens uses");
  command->callback([=, &exit_code] { exit_code = prompts(*o); });
}

}  // namespace mixlora
