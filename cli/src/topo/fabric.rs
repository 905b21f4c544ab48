//! The fabric that `topo` shows, draws and writes: a file's, or this machine.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use tensorwire::topology::Fabric;
use tensorwire::topology::discover::Machine;
use tensorwire::topology::fabric::{Basis, DeviceModel, Kind, Link};

use super::report::{bytes_text, count};
use crate::failure::Failure;
use crate::output::OutputFile;

/// Files that are asked for, opened before anything else is done.
pub(super) struct Files {
    svg: Option<OutputFile>,
    nccl: Option<OutputFile>,
}

impl Files {
    pub(super) fn open(svg: Option<&PathBuf>, nccl: Option<&PathBuf>) -> Result<Files, Failure> {
        let open =
            |option, path: Option<&PathBuf>| path.map(|path| OutputFile::open(option, path)).transpose();
        Ok(Files { svg: open("--svg", svg)?, nccl: open("--export-nccl", nccl)? })
    }

    pub(super) fn write(self, fabric: &Fabric) -> Result<(), Failure> {
        if let Some(file) = self.nccl {
            file.write(&fabric.to_nccl().map_err(Failure::usage)?)?;
        }
        self.svg.map_or(Ok(()), |file| file.write(&fabric.to_svg()))
    }
}

/// The fabric of a file in any format that is read here.
pub(super) fn load(path: &Path) -> Result<Fabric, Failure> {
    Fabric::load(path).map_err(Failure::usage)
}

/// This machine.
pub(super) fn here(machine: &Machine) -> Result<Fabric, Failure> {
    Fabric::of_machine("this machine", machine).map_err(Failure::run)
}

/// What a fabric is, in lines.
pub(super) fn text(fabric: &Fabric) -> String {
    let mut text = String::new();
    let mut line = |name: &str, what: &str| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{name:<12}{what}");
    };
    let (hosts, devices) = (fabric.hosts().len(), fabric.devices().len());
    line("fabric", &format!("{}: {}, {}", fabric.name(), count(hosts, "host"), count(devices, "device")));
    for (at, model) in fabric.parts().models.iter().enumerate() {
        let n = fabric.devices().iter().filter(|d| d.model as usize == at).count();
        if n > 0 {
            line("", &format!("{n} x {}", model_text(model)));
        }
    }
    let workers = fabric.workers();
    for (i, hop) in fabric.classes(&workers).iter().enumerate() {
        let sets = fabric.islands(&workers, hop.class).len();
        let what = format!("{:<8} {}; {}", hop.class, link_text(&hop.link), count(sets, "island"));
        line(if i == 0 { "links" } else { "" }, &what);
    }
    text
}

fn model_text(model: &DeviceModel) -> String {
    let kind = match model.kind {
        Kind::Cpu => format!("processors for {}", count(model.ranks as usize, "rank")),
        Kind::Gpu => "GPU".to_owned(),
        Kind::Accelerator => "accelerator".to_owned(),
    };
    let memory = model.memory_bytes.map_or("memory unknown".to_owned(), bytes_text);
    format!("{} ({kind}), {memory}", model.name)
}

fn link_text(link: &Link) -> String {
    let basis = match link.basis {
        Basis::Measured { error, .. } => format!("measured within {:.0} %", error * 100.0),
        Basis::Rated => "rated".to_owned(),
        Basis::Assumed => "assumed".to_owned(),
    };
    format!("{:.3} GB/s, {} us, {basis}", link.gbps, link.alpha_us)
}
