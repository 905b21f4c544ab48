//! The fuzz targets of this crate on mutated examples: the same inputs every time, so that a failure stays one.

use tensorwire_transports::fuzz;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }
}

/// One change or a few: bits, bytes, lengths, pieces cut out, doubled or taken from elsewhere.
fn mutate(random: &mut Random, examples: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = examples[random.below(examples.len())].clone();
    for _ in 0..=random.below(4) {
        let (at, to) = (random.below(bytes.len()), random.below(bytes.len() + 1));
        let (first, last) = (at.min(to), at.max(to));
        match random.below(7) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
            1 if !bytes.is_empty() => bytes[at] = random.below(256) as u8,
            2 => drop(bytes.drain(first..last)),
            3 => bytes.truncate(first),
            4 => bytes.extend_from_within(first..last),
            5 if bytes.len() >= at + 4 => {
                let odd = [0u32, 1, 0x7fff_ffff, 0x8000_0000, u32::MAX][random.below(5)];
                bytes[at..at + 4].copy_from_slice(&odd.to_le_bytes());
            }
            _ => {
                let other = &examples[random.below(examples.len())];
                bytes.extend_from_slice(&other[random.below(other.len())..]);
            }
        }
    }
    bytes.truncate(1 << 16);
    bytes
}

fn run(target: fn(&[u8]), examples: &[&[u8]]) {
    let examples: Vec<Vec<u8>> = examples.iter().map(|e| e.to_vec()).collect();
    examples.iter().for_each(|example| target(example));
    let mut random = Random(0x5eed_5eed_5eed_5eed);
    for _ in 0..20_000 {
        target(&mutate(&mut random, &examples));
    }
}

#[test]
fn host_files() {
    run(fuzz::hostfile, &[b"node1 slots=4\nada@node2 # x\n", b"10.0.0.1\nfd00::1 slots=2\r\n", b"\xff\xfe"]);
}

#[test]
fn environments() {
    run(
        fuzz::environment,
        &[
            b"TENSORWIRE_RANK=1\nTENSORWIRE_WORLD=2\nTENSORWIRE_STORE=file:/x\nTENSORWIRE_JOB=a\n",
            b"RANK=0\nWORLD_SIZE=2\nMASTER_ADDR=h\nMASTER_PORT=29500\nLOCAL_RANK=0\n",
            b"OMPI_COMM_WORLD_RANK=1\nOMPI_COMM_WORLD_SIZE=2\nPMIX_NAMESPACE=x\n",
            b"SLURM_PROCID=1\nSLURM_NTASKS=4\nSLURM_JOB_ID=3\nSLURM_STEP_ID=0\nSLURM_STEP_NODELIST=a[1-3,5]b,c\nSLURM_NNODES=2\n",
            b"JOB_COMPLETION_INDEX=1\nWORLD_SIZE=3\nMASTER_ADDR=job-0.job\nMASTER_PORT=1\n",
            b"10.0.0.0/8\n",
        ],
    );
}

#[test]
fn an_agents_frames() {
    // A signal, an end, a beat; a line, a rank's end.
    let orders = [&[2u8, 1, 0, 0, 0, 15][..], &[3, 0, 0, 0, 0], &[4, 0, 0, 0, 0]].concat();
    let reports = [&[1u8, 6, 0, 0, 0, 3, 0, 0, 0, b'h', b'i'][..], &[3, 12, 0, 0, 0], &[0; 12]].concat();
    let mut job = vec![1, 0, 0, 0, 0];
    for n in [0u32, 1, 2] {
        job.extend_from_slice(&n.to_le_bytes());
    }
    for text in [&b"/tmp"[..], b"tcp:h:1"] {
        job.extend_from_slice(&(text.len() as u32).to_le_bytes());
        job.extend_from_slice(text);
    }
    job.extend_from_slice(&[1, 0, 0, 0, 4, 0, 0, 0, b't', b'r', b'u', b'e', 0, 0, 0, 0, 0, 0, 0, 0]);
    let len = job.len() as u32 - 5;
    job[1..5].copy_from_slice(&len.to_le_bytes());
    run(fuzz::agent_frames, &[&orders, &reports, &job, b"hello\n\0tensorwire agent 1\n"]);
}

#[test]
fn a_stores_requests() {
    run(
        fuzz::store_requests,
        &[b"\x01\x01kvalue", b"\x03\x01n\x01\0\0\0\0\0\0\0", &[7; 24], b"\x02\x01k\0\0\0\0\0\0\0\0"],
    );
}

#[cfg(feature = "tcp")]
#[test]
fn handshakes_and_frames() {
    let mut hello = [0u8; 88];
    hello[..8].copy_from_slice(b"tensorwr");
    (hello[8], hello[10], hello[12], hello[16]) = (1, 3, 4, 1);
    run(fuzz::handshake, &[&hello, &hello[..48], &[0; 40], &[0; 32]]);
    let mut header = [0u8; 64];
    header[..5].copy_from_slice(b"TWF1\x01");
    run(fuzz::frame_header, &[&header, &[0xff; 64]]);
}
