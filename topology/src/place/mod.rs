//! Placement: which axes to divide a model along, on which devices, and what that costs.
pub mod arrange;
pub mod degrees;
pub mod exchange;
pub mod layout;
pub mod machine;
pub mod pass;
pub mod predict;
pub mod search;
pub mod share;
pub(crate) mod stages;
#[cfg(test)]
mod tests;
pub mod workload;
