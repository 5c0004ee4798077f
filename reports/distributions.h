// Distributions: the normal, Student's t and the binomial, to double precision.
#pragma once
#include <cstdint>

namespace mixlora {

double normal_cdf(double x);
/// Inverse of normal_cdf, 0 < p < 1                                   [Wichura 1988, AS 241]
double normal_quantile(double p);
/// P(T <= t) with `df` > 0 degrees of freedom; df may be infinite (the normal).
double student_cdf(double t, double df);
double student_quantile(double p, double df);
/// P(X <= k), X ~ Binomial(n, p).
double binomial_cdf(std::int64_t k, std::int64_t n, double p);
/// The least k with P(X <= k) >= q.
std::int64_t binomial_quantile(double q, std::int64_t n, double p);
/// I_x(a, b), the regularised incomplete beta function                [DLMF 8.17]
double incomplete_beta(double a, double b, double x);

}  // namespace mixlora
