//! Mixtures of experts: how many there are, and what their weights are called.

/// A mixture of experts in the place of each MLP (Jiang et al. 2024).
#[derive(Clone, Debug, PartialEq)]
pub struct Experts {
    /// The MLPs of a layer.
    pub num_local_experts: usize,
    /// Of these, how many a token runs through; at most all.
    pub num_experts_per_tok: usize,
}

/// The matrix that scores the experts for each token, `(num_local_experts, hidden)`.
pub(crate) const ROUTER: &str = "block_sparse_moe.gate";

/// What precedes the number of an expert.
const EXPERTS: &str = "block_sparse_moe.experts";

/// The matrices of an expert in the order of `gate_proj`, `up_proj` and `down_proj`, which they are.
pub(crate) const EXPERT: [&str; 3] = ["w1", "w3", "w2"];

/// The name of one of its matrices: `block_sparse_moe.experts.7.w1`.
pub(crate) fn of_expert(index: usize, matrix: &str) -> String {
    format!("{EXPERTS}.{index}.{matrix}")
}

/// `block_sparse_moe.experts.7.w1` is the `w1` of expert 7.
pub(crate) fn split_expert(name: &str) -> Option<(usize, &'static str)> {
    let (index, matrix) = name.strip_prefix(EXPERTS)?.strip_prefix('.')?.split_once('.')?;
    let number: usize = index.parse().ok()?;
    // 07 would be the same expert under a second name
    let matrix = EXPERT.into_iter().find(|own| *own == matrix)?;
    (number.to_string() == index).then_some((number, matrix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_of_an_expert_or_none() {
        assert_eq!(split_expert(&of_expert(12, "w3")), Some((12, "w3")));
        for name in ["block_sparse_moe.experts.01.w1", "block_sparse_moe.experts.1.w4", ROUTER] {
            assert_eq!(split_expert(name), None, "{name}");
        }
    }
}
