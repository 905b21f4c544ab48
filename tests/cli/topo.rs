//! `tensorwire topo` as a person and as a script use it.

mod support;
