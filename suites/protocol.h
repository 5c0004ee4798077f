// Protocol: how a suite's rows are asked and scored.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <utility>

namespace mixlora {

enum class Protocol : std::uint8_t { label_token, loglikelihood };
/// Which labels compete in label-token: the row's own, or all of the task's as MoE-PEFT has it.
enum class LabelRule : std::uint8_t { corrected, official };
/// Whether texts begin with BOS: as the tokenizer's own post-processor has it, or never.
enum class Bos : std::uint8_t { automatic, never };

inline auto enum_names(Protocol /*of*/) {
  return std::array<std::pair<Protocol, const char*>, 2>{
      {{Protocol::label_token, "label-token"}, {Protocol::loglikelihood, "loglikelihood"}}};
}
inline auto enum_names(LabelRule /*of*/) {
  return std::array<std::pair<LabelRule, const char*>, 2>{
      {{LabelRule::corrected, "corrected"}, {LabelRule::official, "official"}}};
}
inline auto enum_names(Bos /*of*/) {
  return std::array<std::pair<Bos, const char*>, 2>{
      {{Bos::automatic, "auto"}, {Bos::never, "never"}}};
}
/// "label-token", "loglikelihood".
inline std::string name_of(Protocol p) {
  return p == Protocol::label_token ? "label-token" : "loglikelihood";
}

struct ProtocolSpec {
  Protocol protocol = Protocol::label_token;
  LabelRule label_rule = LabelRule::corrected;
  bool boolq_passage = false;  // label-token: put a task's passage before its question
  Bos bos = Bos::automatic;
  std::int64_t few_shot = 0;  // loglikelihood: solved examples before each question
};
template <class V> void fields(V& v, ProtocolSpec& s) {
  v("protocol", s.protocol);
  v("label_rule", s.label_rule);
  v("boolq_passage", s.boolq_passage);
  v("bos", s.bos);
  v("few_shot", s.few_shot);
}
/// Throws InputError for combinations that mean nothing; `path` is where the spec stands.
void check(const ProtocolSpec& s, const std::string& path);

}  // namespace mixlora
