//! A fabric described by hand, in TOML: `docs/fabric.md` is its reference.
//!
//! Counts stand for what repeats: `count` hosts that are alike, `count` devices in each, of which `per_switch` hang on a
//! switch. So 1,024 devices are a few lines.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{
    Class, Device, DeviceModel, Fabric, Host, Kind, Link, MAX_DEVICES, Nic, Parts, Tflops, nic_link,
};
use crate::{Error, Result};

/// Far above what is written by hand.
const MAX_BYTES: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    #[serde(rename = "model")]
    models: Vec<ModelEntry>,
    #[serde(rename = "host")]
    hosts: Vec<HostEntry>,
    #[serde(default)]
    links: BTreeMap<Class, Link>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelEntry {
    name: String,
    kind: Kind,
    memory: Option<String>,
    memory_gbps: Option<f64>,
    #[serde(default)]
    tflops: Tflops,
    ranks: Option<u32>,
    sm: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostEntry {
    name: String,
    count: Option<u32>,
    rack: Option<Places>,
    per_rack: Option<u32>,
    pod: Option<Places>,
    per_pod: Option<u32>,
    #[serde(default, rename = "device")]
    devices: Vec<DeviceEntry>,
    #[serde(default, rename = "nic")]
    nics: Vec<NicEntry>,
    #[serde(default)]
    links: BTreeMap<Class, Link>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceEntry {
    model: String,
    name: Option<String>,
    count: Option<u32>,
    socket: Option<Places>,
    per_socket: Option<u32>,
    numa: Option<Places>,
    per_numa: Option<u32>,
    switch: Option<Places>,
    per_switch: Option<u32>,
    per_card: Option<u32>,
    per_nvlink: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NicEntry {
    name: String,
    count: Option<u32>,
    mbit_per_s: Option<u64>,
    numa: Option<Places>,
    per_numa: Option<u32>,
    switch: Option<Places>,
    per_switch: Option<u32>,
}

/// Where the devices of an entry are: all on one, or one number each.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a number, or a list of one number for each")]
enum Places {
    All(u32),
    Each(Vec<u32>),
}

/// The first numbers that no entry has used, of what is counted on over the fabric.
#[derive(Default)]
struct Counted {
    domains: u32,
    racks: u32,
    pods: u32,
}

impl Fabric {
    /// Reads a fabric that is described in TOML.
    ///
    /// ```
    /// let fabric = tensorwire_topology::Fabric::from_toml(r#"
    ///     name = "128 servers of 8 GPUs"
    ///
    ///     [[model]]
    ///     name = "H100"
    ///     kind = "gpu"
    ///     memory = "80 GiB"
    ///     memory_gbps = 3350
    ///     tflops = { f16 = 989, f8 = 1979 }
    ///
    ///     [[host]]
    ///     name = "node"
    ///     count = 128
    ///     device = [{ model = "H100", count = 8, per_socket = 4, per_numa = 4, per_switch = 2, per_nvlink = 8 }]
    ///     nic = [{ name = "ib", count = 8, mbit_per_s = 400000, per_numa = 4, per_switch = 1 }]
    ///
    ///     [links]
    ///     nvlink = { alpha_us = 2.5, gbps = 370 }
    /// "#)?;
    /// assert_eq!(fabric.devices().len(), 1024);
    /// assert_eq!(fabric.devices()[9].name, "node1/gpu1");
    /// assert_eq!(fabric.between(8, 15).link.gbps, 370.0);
    /// assert_eq!(fabric.between(0, 8).link.gbps, 50.0); // 400 Gbit/s
    /// # Ok::<(), tensorwire_topology::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Fabric`] that says what to change.
    pub fn from_toml(text: &str) -> Result<Fabric> {
        if text.len() > MAX_BYTES {
            return Err(refused(format!("it has {} bytes, more than {MAX_BYTES}", text.len())));
        }
        let description: Description =
            toml::from_str(text).map_err(|e| refused(e.to_string().trim_end().to_owned()))?;
        description.parts().map_err(refused).and_then(Fabric::new)
    }
}

fn refused(problem: String) -> Error {
    Error::Fabric { what: "the fabric's TOML".to_owned(), problem }
}

type Parsed<T> = std::result::Result<T, String>;

impl Description {
    fn parts(self) -> Parsed<Parts> {
        let mut models: Vec<DeviceModel> = Vec::new();
        for entry in self.models {
            let model = entry.model()?;
            if models.iter().any(|known| known.name == model.name) {
                return Err(format!("two models are named {:?}", model.name));
            }
            models.push(model);
        }
        // Before anything is made of the counts.
        let count = |n: Option<u32>| u64::from(n.unwrap_or(1));
        let of = |host: &HostEntry| host.devices.iter().map(|d| count(d.count)).sum::<u64>();
        let nics = |host: &HostEntry| host.nics.iter().map(|n| count(n.count)).sum::<u64>();
        let total = |each: &dyn Fn(&HostEntry) -> u64| {
            self.hosts.iter().fold(0u64, |sum, h| sum.saturating_add(count(h.count).saturating_mul(each(h))))
        };
        for (what, total) in
            [("hosts", total(&|_| 1)), ("devices", total(&of)), ("network interfaces", total(&nics))]
        {
            if total > MAX_DEVICES as u64 {
                return Err(format!("its counts make {total} {what}, at most {MAX_DEVICES}"));
            }
        }
        let mut parts = Parts { name: self.name, models, links: self.links, ..Parts::default() };
        let mut counted = Counted::default();
        for entry in &self.hosts {
            entry.add(&mut parts, &mut counted)?;
        }
        Ok(parts)
    }
}

impl ModelEntry {
    fn model(self) -> Parsed<DeviceModel> {
        let ModelEntry { name, kind, memory, memory_gbps, tflops, ranks, sm } = self;
        let memory = match memory {
            Some(text) => Some(size(&text).ok_or_else(|| {
                format!(
                    "the model {name:?} has memory = {text:?}, not a size such as \"80 GiB\" or \"16 GB\""
                )
            })?),
            None => None,
        };
        let plain = DeviceModel::new(name, kind, memory);
        Ok(DeviceModel { memory_gbps, tflops, sm, ranks: ranks.unwrap_or(1), ..plain })
    }
}

impl HostEntry {
    fn add(&self, parts: &mut Parts, counted: &mut Counted) -> Parsed<()> {
        let nics = self.nics()?;
        let domains = &mut counted.domains;
        let racks = self.tier("rack", &self.rack, self.per_rack, &mut counted.racks)?;
        let pods = self.tier("pod", &self.pod, self.per_pod, &mut counted.pods)?;
        let mut links = self.links.clone();
        if !links.contains_key(&Class::Network)
            && !parts.links.contains_key(&Class::Network)
            && let Some(link) = nic_link(&nics)
        {
            links.insert(Class::Network, link);
        }
        let copies = self.count.unwrap_or(1);
        let mut cards = 0;
        let mut numbers: BTreeMap<String, u32> = BTreeMap::new();
        // The devices of one host, each with the first domain of its entry, and its entry's count and domain.
        let mut devices = Vec::new();
        for entry in &self.devices {
            let (count, in_domain) = (entry.count.unwrap_or(1), entry.per_nvlink);
            let on = |why: String| format!("host {:?}: {why}", self.name);
            let model = parts.models.iter().position(|m| m.name == entry.model);
            let model = model.ok_or_else(|| on(format!("there is no model {:?}", entry.model)))?;
            let place = |what, given: &Option<Places>, per| {
                places(count, given, per).map_err(|why| on(format!("{what} of {:?} {why}", entry.model)))
            };
            let socket = place("socket", &entry.socket, entry.per_socket)?;
            let numa = place("numa", &entry.numa, entry.per_numa)?;
            let switch = place("switch", &entry.switch, entry.per_switch)?;
            let card = place("card", &None, entry.per_card)?;
            if let Some(n) = in_domain
                && (n == 0 || (count % n != 0 && n % count != 0))
            {
                return Err(on(format!(
                    "per_nvlink = {n} of {:?} neither divides count = {count} nor is a multiple of it",
                    entry.model
                )));
            }
            let kind = match parts.models[model].kind {
                Kind::Cpu => "cpu",
                Kind::Gpu => "gpu",
                Kind::Accelerator => "accelerator",
            };
            let prefix = entry.name.as_deref().unwrap_or(kind);
            let number = numbers.entry(prefix.to_owned()).or_default();
            for i in 0..count as usize {
                let device = Device {
                    socket: socket[i],
                    numa: numa[i],
                    switch: switch[i],
                    card: card[i].map(|c| cards + c),
                    ..Device::new(format!("{prefix}{number}"), 0, model as u32)
                };
                // Devices are counted over all hosts of the entry: so a domain may span them.
                let domain = in_domain.map(|n| (*domains, n, count, i as u32));
                devices.push((device, domain));
                *number += 1;
            }
            cards += entry.per_card.map_or(0, |per| count.div_ceil(per));
            // No more than there are devices, or one.
            *domains += in_domain.map_or(0, |n| (count * copies).div_ceil(n));
        }
        for copy in 0..copies {
            let name = self.count.map_or_else(|| self.name.clone(), |_| format!("{}{copy}", self.name));
            let host = parts.hosts.len() as u32;
            for (device, domain) in &devices {
                let nvlink = domain.map(|(first, n, count, i)| first + (copy * count + i) / n);
                let name = format!("{name}/{}", device.name);
                parts.devices.push(Device { name, host, nvlink, ..device.clone() });
            }
            let (rack, pod) = (racks[copy as usize], pods[copy as usize]);
            parts.hosts.push(Host { name, rack, pod, nics: nics.clone(), links: links.clone() });
        }
        Ok(())
    }

    /// The racks or pods of the entry's hosts, and the next free number.
    fn tier(
        &self,
        what: &str,
        given: &Option<Places>,
        per: Option<u32>,
        next: &mut u32,
    ) -> Parsed<Vec<Option<u32>>> {
        let mut numbers = places(self.count.unwrap_or(1), given, per)
            .map_err(|why| format!("host {:?}: {what} {why}", self.name))?;
        if per.is_some() {
            // Counted on over the entries, as these are other hosts.
            numbers.iter_mut().flatten().for_each(|n| *n = n.saturating_add(*next));
        }
        let highest = numbers.iter().flatten().max();
        *next = (*next).max(highest.map_or(0, |n| n.saturating_add(1)));
        Ok(numbers)
    }

    fn nics(&self) -> Parsed<Vec<Nic>> {
        let mut nics = Vec::new();
        for entry in &self.nics {
            let count = entry.count.unwrap_or(1);
            let place = |what, given: &Option<Places>, per| {
                places(count, given, per)
                    .map_err(|why| format!("host {:?}: {what} of {:?} {why}", self.name, entry.name))
            };
            let numa = place("numa", &entry.numa, entry.per_numa)?;
            let switch = place("switch", &entry.switch, entry.per_switch)?;
            for i in 0..count as usize {
                let name = match entry.count {
                    Some(_) => format!("{}{i}", entry.name),
                    None => entry.name.clone(),
                };
                let (numa, switch) = (numa[i], switch[i]);
                nics.push(Nic { name, mbit_per_s: entry.mbit_per_s, numa, switch, bus: None });
            }
        }
        Ok(nics)
    }
}

/// One number for each of `count`, as an entry gives them or by how many share one.
fn places(count: u32, given: &Option<Places>, per: Option<u32>) -> Parsed<Vec<Option<u32>>> {
    match (given, per) {
        (Some(_), Some(_)) => Err("is given twice, as a number and by how many share one".to_owned()),
        (_, Some(0)) => Err("is shared by 0: give 1 or more".to_owned()),
        (None, Some(per)) => Ok((0..count).map(|i| Some(i / per)).collect()),
        (Some(Places::All(n)), None) => Ok(vec![Some(*n); count as usize]),
        (Some(Places::Each(each)), None) if each.len() == count as usize => {
            Ok(each.iter().map(|n| Some(*n)).collect())
        }
        (Some(Places::Each(each)), None) => Err(format!("has {} numbers for {count}", each.len())),
        (None, None) => Ok(vec![None; count as usize]),
    }
}

/// Bytes of a size such as `80 GiB` or `16GB`.
fn size(text: &str) -> Option<u64> {
    let at = text.find(|c: char| c.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(at);
    let unit: f64 = match unit {
        "B" => 1.0,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "MiB" => (1u64 << 20) as f64,
        "GiB" => (1u64 << 30) as f64,
        "TiB" => (1u64 << 40) as f64,
        _ => return None,
    };
    let bytes = number.trim().parse::<f64>().ok()? * unit;
    (bytes >= 1.0 && bytes < (1u64 << 62) as f64).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEAD: &str = "name = \"f\"\n[[model]]\nname = \"m\"\nkind = \"gpu\"\nmemory = \"16 GB\"\n";

    fn with(rest: &str) -> Result<Fabric> {
        Fabric::from_toml(&format!("{HEAD}{rest}"))
    }

    #[test]
    fn sizes() {
        assert_eq!(size("80 GiB"), Some(80 << 30));
        assert_eq!(size("15.7GiB"), Some(16_857_746_636));
        assert_eq!(size("16 GB"), Some(16_000_000_000));
        for bad in ["80", "GiB", "-1 GiB", "0 GB", "1e300 TB", "NaN GB", "80 Gib", "80 GiB ", ""] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }

    #[test]
    fn places_are_shared_listed_or_one() {
        let fabric = with(
            "[[host]]\nname = \"a\"\ndevice = [
               { model = \"m\", count = 4, per_card = 2, numa = 1, switch = [5, 5, 6, 6] },
               { model = \"m\", count = 2, per_card = 1, name = \"x\" }, { model = \"m\" }]",
        )
        .unwrap();
        let places: Vec<_> =
            fabric.devices().iter().map(|d| (&*d.name, d.numa, d.switch, d.card, d.nvlink)).collect();
        assert_eq!(
            places,
            [
                ("a/gpu0", Some(1), Some(5), Some(0), None),
                ("a/gpu1", Some(1), Some(5), Some(0), None),
                ("a/gpu2", Some(1), Some(6), Some(1), None),
                ("a/gpu3", Some(1), Some(6), Some(1), None),
                ("a/x0", None, None, Some(2), None),
                ("a/x1", None, None, Some(3), None),
                ("a/gpu4", None, None, None, None),
            ]
        );
    }

    #[test]
    fn an_nvlink_domain_may_span_hosts() {
        let domains = |rest: &str| -> Vec<Option<u32>> {
            let text = format!("{rest}\n[links]\nnetwork = {{ alpha_us = 1, gbps = 1 }}");
            with(&text).unwrap().devices().iter().map(|d| d.nvlink).collect()
        };
        let spanning =
            "[[host]]\nname = \"a\"\ncount = 4\ndevice = [{ model = \"m\", count = 2, per_nvlink = 4 }]";
        assert_eq!(domains(spanning), [0, 0, 0, 0, 1, 1, 1, 1].map(Some));
        let two = "[[host]]\nname = \"a\"\ncount = 2\ndevice = [{ model = \"m\", count = 2, per_nvlink = 2 },
            { model = \"m\", per_nvlink = 1 }]\n[[host]]\nname = \"b\"\ndevice = [{ model = \"m\", count = 2, per_nvlink = 2 }]";
        assert_eq!(domains(two), [0, 0, 2, 1, 1, 3, 4, 4].map(Some));
    }

    #[test]
    fn racks_and_pods_are_counted_on_over_entries() {
        let hosts = |rest: &str| -> Vec<(Option<u32>, Option<u32>)> {
            let text = format!("{rest}\n[links]\nnetwork = {{ alpha_us = 1, gbps = 1 }}");
            with(&text).unwrap().hosts().iter().map(|h| (h.rack, h.pod)).collect()
        };
        let device = "device = [{ model = \"m\" }]";
        let entry = |name: &str, rest: &str| format!("[[host]]\nname = \"{name}\"\n{device}\n{rest}\n");
        let one = entry("a", "count = 5\nper_rack = 2\nper_pod = 4");
        let two = one.clone() + &entry("b", "count = 2\nper_rack = 2\npod = 1") + &entry("c", "");
        let a = [(0, 0), (0, 0), (1, 0), (1, 0), (2, 1)].map(|(r, p)| (Some(r), Some(p)));
        assert_eq!(hosts(&one), a);
        assert_eq!(hosts(&two)[..5], a);
        assert_eq!(hosts(&two)[5..], [(Some(3), Some(1)), (Some(3), Some(1)), (None, None)]);
    }

    #[test]
    fn network_interfaces_say_what_the_network_is() {
        let host = "[[host]]\nname = \"a\"\ncount = 2\ndevice = [{ model = \"m\" }]\n";
        let nics = "nic = [{ name = \"e\", mbit_per_s = 1000 }, { name = \"ib\", count = 2, mbit_per_s = 100000 }]\n";
        let fabric = with(&format!("{host}{nics}")).unwrap();
        assert_eq!(fabric.between(0, 1).link.gbps, 12.5);
        assert_eq!(fabric.hosts()[1].nics[2].name, "ib1");
        let given = with(&format!("{host}{nics}[links]\nnetwork = {{ alpha_us = 9, gbps = 2 }}\n")).unwrap();
        assert_eq!(given.between(0, 1).link, Link::rated(9.0, 2.0));
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_says_why() {
        let host = |device: &str| format!("[[host]]\nname = \"a\"\ndevice = [{{ model = \"m\", {device} }}]");
        for (text, why) in [
            (host("count = 4, per_numa = 0"), "numa of \"m\" is shared by 0"),
            (host("count = 4, numa = 1, per_numa = 2"), "given twice"),
            (host("count = 4, numa = [1, 2]"), "has 2 numbers for 4"),
            (host("count = 4, numa = -1"), "a number, or a list of one number for each"),
            (host("count = 4, per_nvlink = 3"), "neither divides count = 4"),
            (host("count = 4294967295"), "counts make 4294967295 devices, at most 65536"),
            (host("count = -4"), "invalid value"),
            (host("count = 0"), "0 devices"),
            (host("cuont = 4"), "unknown field `cuont`"),
            (host("count = 4, per_switch = 4, per_numa = 2"), "switch 0 but not of the same numa"),
            (
                "[[host]]\nname = \"a\"\ncount = 2\nrack = [1]\ndevice = [{ model = \"m\" }]".into(),
                "host \"a\": rack has 1 numbers for 2",
            ),
            (
                "[[host]]\nname = \"a\"\ncount = 4\nper_rack = 2\nper_pod = 3\ndevice = [{ model = \"m\" }]"
                    .into(),
                "of rack 1 but not of the same pod",
            ),
            (
                "[[host]]\nname = \"a\"\ncount = 9999999\ndevice = [{ model = \"m\" }]".into(),
                "make 9999999 hosts",
            ),
            (
                "[[host]]\nname = \"a\"\ncount = 2\ndevice = [{ model = \"m\" }]".into(),
                "no path to the others",
            ),
            ("[[host]]\nname = \"a\"\ndevice = [{ model = \"n\" }]".into(), "there is no model \"n\""),
            ("[[host]]\nname = \"a\"".into(), "0 devices"),
            (
                "[[model]]\nname = \"m\"\nkind = \"gpu\"\n[[host]]\nname = \"a\"".into(),
                "two models are named \"m\"",
            ),
            (
                "[[model]]\nname = \"n\"\nkind = \"gpu\"\nmemory = \"80\"\n[[host]]\nname = \"a\"".into(),
                "not a size",
            ),
            ("[[model]]\nname = \"n\"\nkind = \"tpu\"".into(), "unknown variant `tpu`"),
            (
                "[[host]]\nname = \"a\"\nnic = [{ name = \"e\", count = 4000000000 }]".into(),
                "network interfaces, at most",
            ),
            ("[links]\nnumal = { alpha_us = 1, gbps = 1 }".into(), "unknown variant `numal`"),
            ("x".repeat(2 << 20), "more than 1048576"),
            ("[[host".into(), "TOML parse error"),
        ] {
            let refused = with(&text).unwrap_err().to_string();
            assert!(refused.contains(why), "{why}: {refused}");
        }
    }

    proptest! {
        /// What counts stand for, against counting.
        #[test]
        fn counts_stand_for_what_repeats(hosts in 1u32..5, count in 1u32..9, per in 1u32..9, gbps in 1u32..900) {
            let fabric = with(&format!(
                "[[host]]\nname = \"h\"\ncount = {hosts}\ndevice = [{{ model = \"m\", count = {count}, per_numa = {per} }}]
                 [links]\nnetwork = {{ alpha_us = 20, gbps = 1 }}\nnuma = {{ alpha_us = 3, gbps = {gbps} }}"
            )).unwrap();
            prop_assert_eq!(fabric.devices().len(), (hosts * count) as usize);
            for (i, device) in fabric.devices().iter().enumerate() {
                let (host, at) = (i as u32 / count, i as u32 % count);
                prop_assert_eq!((device.host, device.numa), (host, Some(at / per)));
                prop_assert_eq!(&device.name, &format!("h{host}/gpu{at}"));
            }
            prop_assert_eq!(fabric.islands(&fabric.all(), Class::Numa).len() as u32, hosts * count.div_ceil(per));
            if count.min(per) > 1 {
                prop_assert_eq!(fabric.between(0, 1).link, Link::rated(3.0, gbps.into()));
            }
            prop_assert_eq!(Fabric::from_json(&fabric.to_json()).unwrap(), fabric);
        }

        #[test]
        fn no_text_is_a_panic(text in "[\\[\\]a-z={}\" 0-9\n.,-]{0,200}") {
            let _ = (Fabric::from_toml(&text), with(&text));
        }
    }
}
