//! The steps of Adam (Kingma and Ba 2014).

/// Both moments' decay and what corrects their start at zero, of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adam {
    keep: [f32; 2],
    bias: [f32; 2],
}

/// Added to the root of the second moment, so that parameters that nothing depends on stay.
const EPSILON: f32 = 1e-12;

impl Adam {
    /// Of step `step`, from 0, with these shares of the moments kept.
    pub fn at(step: usize, keep: [f32; 2]) -> Self {
        Self { keep, bias: keep.map(|keep| 1.0 - keep.powi(step as i32 + 1)) }
    }

    /// Takes the gradient into the first moment.
    #[inline]
    pub fn first(&self, moment: &mut f32, gradient: f32) {
        *moment = self.keep[0] * *moment + (1.0 - self.keep[0]) * gradient;
    }

    /// Takes the gradient into the second moment.
    #[inline]
    pub fn second(&self, moment: &mut f32, gradient: f32) {
        *moment = self.keep[1] * *moment + (1.0 - self.keep[1]) * gradient * gradient;
    }

    /// Of the direction first / second, the numerator and the denominator.
    #[inline]
    pub fn direction(&self, first: f32, second: f32) -> (f32, f32) {
        (first / self.bias[0], (second / self.bias[1]).sqrt() + EPSILON)
    }
}
