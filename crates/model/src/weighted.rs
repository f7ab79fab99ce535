//! The one weighted choice of the workspace: endpoints, backends of a rule, members of a group.
//!
//! Owns the sums and what a position among them means. Never draws a random number: the caller gives the source, so that
//! a simulation can repeat itself.

use std::ops::Range;

/// Weights of a list, for choosing one of its elements in logarithmic time. An element of weight 0 is never chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Weighted {
    /// Sums of weights up to and with each element.
    sums: Vec<u64>,
}

impl Weighted {
    /// Sums the weights up. A sum beyond 64 bits stays at the greatest number.
    pub fn new(weights: impl IntoIterator<Item = u32>) -> Self {
        let mut sum: u64 = 0;
        let add = |weight: u32| {
            sum = sum.saturating_add(u64::from(weight));
            sum
        };
        Self { sums: weights.into_iter().map(add).collect() }
    }

    /// The sum of all weights.
    pub fn total(&self) -> u64 {
        self.sums.last().copied().unwrap_or(0)
    }

    /// The element that has a position in `0..total()`; `None` beyond it.
    pub fn at(&self, position: u64) -> Option<usize> {
        let n = self.sums.partition_point(|sum| *sum <= position);
        (n < self.sums.len()).then_some(n)
    }

    /// Chooses an element with one number drawn from a range; `None` where no element has a weight.
    pub fn choose(&self, draw: impl FnOnce(Range<u64>) -> u64) -> Option<usize> {
        let total = self.total();
        if total == 0 { None } else { self.at(draw(0..total)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pearson's statistic of 100,000 choices, with a generator of the test's own (xorshift64*).
    fn chi_square(weights: &[u32]) -> f64 {
        const CHOICES: u32 = 100_000;
        let weighted = Weighted::new(weights.iter().copied());
        let mut state: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut counts = vec![0u32; weights.len()];
        for _ in 0..CHOICES {
            let chosen = weighted.choose(|range| {
                state ^= state >> 12;
                state ^= state << 25;
                state ^= state >> 27;
                (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) % range.end
            });
            counts[chosen.expect("there are weights")] += 1;
        }
        let share = |w: u32| f64::from(CHOICES) * f64::from(w) / weighted.total() as f64;
        counts.iter().zip(weights).map(|(n, w)| (f64::from(*n) - share(*w)).powi(2) / share(*w)).sum()
    }

    #[test]
    fn every_element_gets_its_share() {
        // The limits are exceeded by chance once in a thousand runs; the generator is seeded, so this one is not.
        for (weights, limit) in [
            (&[1; 2][..], 10.8),
            (&[1; 3], 13.8),
            (&[1; 5], 18.5),
            (&[1; 20], 43.8),
            (&[1, 2, 3], 13.8),
            (&[100, 1, 50, 7], 16.3),
        ] {
            let statistic = chi_square(weights);
            assert!(statistic < limit, "{weights:?}: {statistic} is beyond {limit}");
        }
    }

    #[test]
    fn positions_and_edges() {
        let weighted = Weighted::new([0, 2, 0, 1, 0]);
        let at: Vec<_> = (0..5).map(|n| weighted.at(n)).collect();
        assert_eq!(at, [Some(1), Some(1), Some(3), None, None]);
        assert_eq!(Weighted::new([]).choose(|_| 0), None);
        assert_eq!(Weighted::new([0, 0]).choose(|_| 0), None);
        assert_eq!(Weighted::new([u32::MAX; 3]).total(), 3 * u64::from(u32::MAX));
    }
}
