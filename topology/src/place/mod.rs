//! Placement: which axes to divide a model along, on which devices, and what that costs.
pub mod degrees;
pub mod exchange;
pub mod layout;
pub mod machine;
pub mod share;
pub mod workload;
