//! A fabric's JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Class, Device, DeviceModel, Fabric, Host, Link, Pair, Parts, SCHEMA};
use crate::plan::json::lines;
use crate::{Error, Result};

/// Far above what a fabric of 65,536 devices takes.
const MAX_BYTES: usize = 64 << 20;

/// What every version's file says.
#[derive(Deserialize)]
struct Head {
    schema: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema: String,
    name: String,
    models: Vec<DeviceModel>,
    hosts: Vec<Host>,
    links: BTreeMap<Class, Link>,
    devices: Vec<Device>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pairs: Vec<Pair>,
}

impl Fabric {
    /// The fabric as JSON, schema [`SCHEMA`]. The same fabric gives the same bytes.
    pub fn to_json(&self) -> String {
        lines(&self.file()) + "\n"
    }

    /// The same as a value, to be part of another one.
    pub fn to_value(&self) -> serde_json::Value {
        // Its keys are strings, and its numbers finite.
        serde_json::to_value(self.file()).unwrap_or_default()
    }

    fn file(&self) -> File {
        let Parts { name, models, hosts, devices, links, pairs } = self.parts().clone();
        File { schema: SCHEMA.to_owned(), name, models, hosts, links, devices, pairs }
    }

    /// Reads a fabric's JSON, which may come from anywhere.
    ///
    /// # Errors
    /// [`Error::Json`] for what is no JSON or not of this form, and what [`Fabric::new`] refuses.
    pub fn from_json(json: &str) -> Result<Fabric> {
        let refused = |problem: String| Error::Fabric { what: "the fabric".to_owned(), problem };
        if json.len() > MAX_BYTES {
            return Err(refused(format!("it has {} bytes, more than {MAX_BYTES}", json.len())));
        }
        let wrong = |source| Error::Json { what: "the fabric".to_owned(), source };
        let Head { schema } = serde_json::from_str(json).map_err(wrong)?;
        if schema != SCHEMA {
            return Err(refused(format!("its schema is {schema:?}, and {SCHEMA:?} is read here")));
        }
        let File { schema: _, name, models, hosts, links, devices, pairs } =
            serde_json::from_str(json).map_err(wrong)?;
        Fabric::new(Parts { name, models, hosts, devices, links, pairs })
    }
}
