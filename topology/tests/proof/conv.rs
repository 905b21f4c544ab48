//! A convolutional decoder whose picture is cut by height: halos before convolutions, sums for group norms.

use tensorwire_topology::plan::Span;
use tensorwire_topology::shard::{Step, StepRows, by_height};

use super::TOLERANCE;
use super::tensor::{Tensor, silu};

const WIDTH: usize = 5;
const GROUPS: usize = 2;

/// Rows, then channels, then columns, so that rows are what a tensor's first dimension counts.
type Picture = Tensor;

enum Layer {
    /// A convolution to so many channels, with as many columns as rows of weights.
    Convolution {
        channels: usize,
        kernel: usize,
        stride: usize,
    },
    Upsample,
    NormAndSilu,
}

/// As a decoder of latents goes, and a stride as an encoder has it.
const LAYERS: [Layer; 9] = [
    Layer::Convolution { channels: 4, kernel: 3, stride: 1 },
    Layer::NormAndSilu,
    Layer::Convolution { channels: 4, kernel: 5, stride: 1 },
    Layer::Upsample,
    Layer::NormAndSilu,
    Layer::Convolution { channels: 6, kernel: 3, stride: 1 },
    Layer::Convolution { channels: 4, kernel: 3, stride: 2 },
    Layer::NormAndSilu,
    Layer::Convolution { channels: 3, kernel: 3, stride: 1 },
];

/// What is done wrong on purpose.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Neighbours' rows are zeros.
    NoHalo,
    /// A halo that is a row off.
    OtherRows,
    /// Each rank norms by its own rows.
    OwnStatistics,
}

fn seeded(shape: &[usize], seed: usize) -> Tensor {
    Tensor::of(shape, |i| ((i * 7919 + seed * 104_729) % 1013) as f64 / 506.5 - 1.0)
}

fn steps() -> Vec<Step> {
    let step = |layer: &Layer| match layer {
        Layer::Convolution { kernel, stride, .. } => {
            Some(Step::Convolution { kernel: *kernel, stride: *stride })
        }
        Layer::Upsample => Some(Step::Upsample { factor: 2 }),
        Layer::NormAndSilu => None,
    };
    LAYERS.iter().filter_map(step).collect()
}

/// The element of a picture; zero beyond its edges.
fn at(x: &Picture, row: i64, channel: usize, column: i64) -> f64 {
    let (rows, channels) = (x.shape[0] as i64, x.shape[1]);
    let inside = (0..rows).contains(&row) && (0..WIDTH as i64).contains(&column);
    if inside { x.data[(row as usize * channels + channel) * WIDTH + column as usize] } else { 0.0 }
}

/// The rows `made` of a convolution, of which `x` has the rows from `first` on.
fn convolve(x: &Picture, first: usize, made: Span, weights: &Tensor, stride: usize) -> Picture {
    let [out, channels, kernel, _] = weights.shape[..] else { unreachable!() };
    let reach = (kernel / 2) as i64;
    Tensor::of(&[made.len(), out, WIDTH], |i| {
        let (row, o, column) = (made.start + i / (out * WIDTH), i / WIDTH % out, i % WIDTH);
        let mut sum = 0.0;
        for c in 0..channels {
            for (k, l) in (0..kernel).flat_map(|k| (0..kernel).map(move |l| (k, l))) {
                let from = (row * stride) as i64 + k as i64 - reach - first as i64;
                let weight = weights.data[((o * channels + c) * kernel + k) * kernel + l];
                sum += weight * at(x, from, c, column as i64 + l as i64 - reach);
            }
        }
        sum
    })
}

/// Each group's count, sum and sum of squares.
fn statistics(x: &Picture) -> Vec<[f64; 3]> {
    let channels = x.shape[1];
    let mut all = vec![[0.0; 3]; GROUPS];
    for (i, v) in x.data.iter().enumerate() {
        let group = i / WIDTH % channels * GROUPS / channels;
        all[group] = [all[group][0] + 1.0, all[group][1] + v, all[group][2] + v * v];
    }
    all
}

fn norm(x: &Picture, statistics: &[[f64; 3]]) -> Picture {
    let channels = x.shape[1];
    Tensor::of(&x.shape, |i| {
        let [count, sum, squares] = statistics[i / WIDTH % channels * GROUPS / channels];
        let mean = sum / count;
        silu((x.data[i] - mean) / (squares / count - mean * mean + 1e-6).sqrt())
    })
}

/// The rows that a rank needs, from whoever has them.
fn gather(parts: &[Picture], rows: &StepRows, rank: usize, fault: Fault) -> Picture {
    let row = |wanted: usize| {
        let owner = rows.has.iter().position(|has| has.contains(wanted)).unwrap();
        let local = wanted - rows.has[owner].start;
        match fault {
            Fault::NoHalo if owner != rank => vec![0.0; parts[owner].cols()],
            Fault::OtherRows if owner != rank => parts[owner].row((local + 1) % parts[owner].rows()).to_vec(),
            _ => parts[owner].row(local).to_vec(),
        }
    };
    let needs = rows.needs[rank];
    let data = (needs.start..needs.end).flat_map(row).collect();
    Tensor::new(&[needs.len(), parts[rank].shape[1], WIDTH], data)
}

/// What `world` ranks make of a latent of `rows` rows, put together.
fn decode(rows: usize, world: usize, fault: Fault) -> Picture {
    let latent = seeded(&[rows, 2, WIDTH], 1);
    let plan = by_height(rows, &steps(), world).unwrap();
    let range = |s: Span| (s.start..s.end).collect::<Vec<_>>();
    let mut parts: Vec<Picture> = plan[0].has.iter().map(|s| latent.select(0, &range(*s))).collect();
    let mut step = plan.iter();
    for (n, layer) in LAYERS.iter().enumerate() {
        if let Layer::NormAndSilu = layer {
            let each: Vec<_> = parts.iter().map(statistics).collect();
            let sum = |group: usize| [0, 1, 2].map(|i| each.iter().map(|s| s[group][i]).sum());
            let all: Vec<[f64; 3]> = (0..GROUPS).map(sum).collect();
            let of = |rank: usize| if fault == Fault::OwnStatistics { &each[rank] } else { &all };
            parts = parts.iter().enumerate().map(|(rank, x)| norm(x, of(rank))).collect();
            continue;
        }
        let rows = step.next().unwrap();
        let next = |rank: usize| {
            let (x, first, made) =
                (gather(&parts, rows, rank, fault), rows.needs[rank].start, rows.makes[rank]);
            match layer {
                Layer::Convolution { channels, kernel, stride } => {
                    let weights = seeded(&[*channels, x.shape[1], *kernel, *kernel], n + 2);
                    convolve(&x, first, made, &weights, *stride)
                }
                _ => x.select(0, &range(made).iter().map(|row| row / 2 - first).collect::<Vec<_>>()),
            }
        };
        parts = (0..world).map(next).collect();
    }
    let shape = [parts.iter().map(Tensor::rows).sum(), parts[0].shape[1], WIDTH];
    Tensor::below(&parts).reshape(&shape)
}

fn apart(a: &Picture, b: &Picture) -> f64 {
    assert_eq!(a.shape, b.shape);
    let largest = a.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    a.data.iter().zip(&b.data).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn a_picture_cut_by_height_is_the_whole_one() {
    for rows in [5, 8, 11] {
        let whole = decode(rows, 1, Fault::None);
        for world in 2..=rows {
            // Also where a kernel reaches beyond a neighbour that has one row.
            let apart = apart(&whole, &decode(rows, world, Fault::None));
            assert!(apart < TOLERANCE, "{rows} rows over {world}: apart by {apart:.1e}");
        }
        assert!(by_height(rows, &steps(), rows + 1).is_err());
    }
}

#[test]
fn a_wrong_halo_or_sum_is_seen() {
    let whole = decode(8, 1, Fault::None);
    for (fault, what) in [
        (Fault::NoHalo, "no halo"),
        (Fault::OtherRows, "other rows"),
        (Fault::OwnStatistics, "own statistics"),
    ] {
        for world in [2, 3, 8] {
            // Of neighbours with one row there is no other.
            if fault == Fault::OtherRows && world == 8 {
                continue;
            }
            assert!(apart(&whole, &decode(8, world, fault)) > 1e-3, "{what} over {world} goes unseen");
        }
    }
}
