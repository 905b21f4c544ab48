//! The operations, on the types that elements are accumulated in.

/// A reduction over values of type `A`. NaNs may come out in any form: narrowing makes them one.
pub(super) trait Combine<A> {
    /// What an element counts as.
    #[inline(always)]
    fn load(x: A, _factor: f64) -> A {
        x
    }

    fn combine(a: A, b: A) -> A;

    /// What the combination of all `n` elements becomes.
    #[inline(always)]
    fn finish(a: A, _n: usize) -> A {
        a
    }
}

pub(super) struct Sum;
pub(super) struct Product;
pub(super) struct Min;
pub(super) struct Max;
pub(super) struct Average;
pub(super) struct PreScaledSum;
#[cfg(feature = "tcp")]
pub(super) struct Divide;
pub(super) struct BitAnd;
pub(super) struct BitOr;
pub(super) struct BitXor;

macro_rules! floats {
    ($($t:ty),*) => {
        $(
            impl Combine<$t> for Sum {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a + b
                }
            }

            impl Combine<$t> for Product {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a * b
                }
            }

            impl Combine<$t> for Min {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    // Equal values differ at most in the sign of zero: or-ing the bits gives -0.
                    let tie = <$t>::from_bits(a.to_bits() | b.to_bits());
                    let least = if a < b { a } else if b < a { b } else { tie };
                    if a.is_nan() | b.is_nan() { <$t>::NAN } else { least }
                }
            }

            impl Combine<$t> for Max {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    // And-ing the bits of equal values gives +0.
                    let tie = <$t>::from_bits(a.to_bits() & b.to_bits());
                    let most = if a > b { a } else if b > a { b } else { tie };
                    if a.is_nan() | b.is_nan() { <$t>::NAN } else { most }
                }
            }

            impl Combine<$t> for Average {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a + b
                }

                #[inline(always)]
                fn finish(a: $t, n: usize) -> $t {
                    a / n as $t
                }
            }

            impl Combine<$t> for PreScaledSum {
                #[inline(always)]
                fn load(x: $t, factor: f64) -> $t {
                    x * factor as $t
                }

                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a + b
                }
            }

            #[cfg(feature = "tcp")]
            impl Combine<$t> for Divide {
                #[inline(always)]
                fn load(x: $t, factor: f64) -> $t {
                    x / factor as $t
                }

                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a + b
                }
            }
        )*
    };
}

macro_rules! integers {
    ($($t:ty),*) => {
        $(
            impl Combine<$t> for Sum {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a.wrapping_add(b)
                }
            }

            impl Combine<$t> for Product {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a.wrapping_mul(b)
                }
            }

            impl Combine<$t> for Min {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a.min(b)
                }
            }

            impl Combine<$t> for Max {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a.max(b)
                }
            }

            impl Combine<$t> for BitAnd {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a & b
                }
            }

            impl Combine<$t> for BitOr {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a | b
                }
            }

            impl Combine<$t> for BitXor {
                #[inline(always)]
                fn combine(a: $t, b: $t) -> $t {
                    a ^ b
                }
            }
        )*
    };
}

floats!(f32, f64);
integers!(i8, u8, i32, u32, i64, u64);
