//! Pictures and pages of plans: everything that a plan says is there, within the picture, and nothing covers
//! anything else.

mod common;

use common::{model, plan};
use tensorwire_topology::svg::text_width;
use tensorwire_topology::{Fabric, ModelSpec, Plan, Planner};

/// The plans to draw: even, uneven, with copies, with more ranks than are drawn, one rank, experts, encoders, models
/// without a vocabulary.
fn plans() -> Vec<Plan> {
    let cases = [
        ("llama-3.1-8b", 1),
        ("llama-3.1-8b", 3),
        ("llama-3.1-8b", 32),
        ("llama-3.1-70b", 6),
        ("llama-3.1-70b", 8),
        ("llama-3.1-70b", 64),
        ("qwen2.5-7b", 7),
        ("smollm2-135m", 2),
        ("all-minilm-l6-v2", 5),
        ("mixtral-8x7b", 3),
        ("mixtral-8x7b", 8),
        ("qwen3-235b-a22b-fp8", 8),
        ("falcon-7b", 8),
        ("t5-small", 3),
        ("wan2.1-1.3b", 5),
    ];
    cases.map(|(name, world)| plan(&model(name), world)).into()
}

#[derive(Debug)]
struct Area {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    text: String,
}

fn attribute(element: &str, key: &str) -> Option<f64> {
    element.split_once(&format!(" {key}=\""))?.1.split('"').next()?.parse().ok()
}

/// Where each text of a picture is.
fn texts(svg: &str) -> Vec<Area> {
    let area = |element: &str| {
        let text = element.split_once('>').unwrap().1.split('<').next().unwrap();
        let (x, y) = (attribute(element, "x").unwrap(), attribute(element, "y").unwrap());
        let size = attribute(element, "font-size").unwrap();
        let width = text_width(text, size);
        let before = match element.split_once("text-anchor=\"").unwrap().1.split('"').next().unwrap() {
            "start" => 0.0,
            "middle" => width / 2.0,
            _ => width,
        };
        let (top, bottom) = (y - size * 0.75, y + size * 0.2);
        Area { left: x - before, right: x - before + width, top, bottom, text: text.to_owned() }
    };
    svg.lines().filter(|l| l.starts_with("<text")).map(area).collect()
}

#[test]
fn no_text_covers_another_or_leaves_the_picture() {
    for plan in plans() {
        check_layout(&plan, &plan.svg());
    }
}

fn check_layout(plan: &Plan, svg: &str) {
    let (width, height) = (attribute(svg, "width").unwrap(), attribute(svg, "height").unwrap());
    let texts = texts(svg);
    assert!(texts.len() > 10);
    for (i, a) in texts.iter().enumerate() {
        assert!(a.left >= 0.0 && a.right <= width && a.top >= 0.0 && a.bottom <= height, "{a:?}");
        for b in &texts[i + 1..] {
            let apart = a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
            assert!(apart, "{} over {}: {} and {}", plan.model.model_type, plan.world, a.text, b.text);
        }
    }
    for rect in svg.lines().filter(|l| l.starts_with("<rect") && !l.contains("rx=\"6\"")) {
        let edge = |at: &str, size: &str| attribute(rect, at).unwrap() + attribute(rect, size).unwrap();
        assert!(edge("x", "width") <= width && edge("y", "height") <= height, "{rect}");
    }
}

#[test]
fn every_head_is_drawn_where_it_is() {
    let plan = plan(&model("llama-3.1-70b"), 6);
    let svg = plan.svg();
    for rank in 0..6 {
        let (q, kv) = (plan.layers[0].attention.q_heads[rank], plan.layers[0].attention.kv_heads[rank]);
        let drawn = |what: &str| svg.matches(&format!(">rank {rank}: {what} ")).count();
        assert_eq!((drawn("query heads"), drawn("key/value heads")), (q.len(), kv.len()));
    }
    // Heads 1, 2, 5 and 6 are on two ranks each.
    assert_eq!(svg.matches(", on 2 ranks</title>").count(), 8);
    assert!(svg.contains(">rank 2: ffn columns 9558 to 14336</title>"));
    // The two sums of a layer, with a layer's and a token's bytes.
    assert_eq!(svg.matches(">16.4 kB x 80 layers = 1.3 MB a token, ").count(), 2);
}

#[test]
fn deepseek_over_32_has_room() {
    let plan = Planner::new(&model("deepseek-v3")).outline(32).unwrap();
    check_layout(&plan, &plan.svg());
}

#[test]
fn a_fabric_is_drawn_as_its_islands() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/fabrics/32-accelerators.toml");
    let fabric = Fabric::from_toml(&std::fs::read_to_string(path).unwrap()).unwrap();
    let plan = plan(&model("llama-3.1-70b"), 32);
    let svg = plan.svg_on(&fabric, &fabric.workers()).unwrap();
    check_layout(&plan, &svg);
    // Cards of four, NUMA nodes of sixteen, one host.
    for class in ["card", "numa", "host"] {
        assert_eq!(svg.matches(&format!(">{class} links<")).count(), 1, "{class}");
    }
    assert_eq!(svg.matches(ISLAND).count(), 8 + 2 + 1);
    assert!(plan.svg_on(&fabric, &[0, 1]).unwrap_err().to_string().contains("32 ranks, and 2 of 32 devices"));
    assert!(plan.svg_on(&fabric, &[99; 32]).is_err());
}

/// The colour of islands.
const ISLAND: &str = "#d3e4d6";

#[test]
fn of_many_ranks_the_first_are_drawn_and_the_picture_says_so() {
    let svg = plan(&model("llama-3.1-70b"), 64).svg();
    assert!(svg.contains(">rank 63: ") && !svg.contains("not drawn"));
    let config = r#"{"model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 1,
        "num_attention_heads": 128, "intermediate_size": 4096, "vocab_size": 32768}"#;
    let big = plan(&ModelSpec::from_config(config).unwrap(), 128).svg();
    assert!(big.contains("Ranks 64 to 127 are not drawn.") && !big.contains(">rank 64: "));
}

#[test]
fn a_page_has_the_picture_a_line_a_rank_and_every_note() {
    for plan in plans() {
        let html = plan.html();
        assert!(html.starts_with("<!DOCTYPE html>") && html.ends_with("</html>\n"));
        assert!(html.contains(&plan.svg()));
        assert_eq!(html.matches("<li>").count(), plan.notes.len());
        let lines = html.matches("<tr>").count();
        assert!(lines > plan.world, "{lines}");
        // It needs nothing else, and runs nothing.
        for outside in ["<script", "<link", "<img", "src=", "@import"] {
            assert!(!html.contains(outside), "{outside}");
        }
        let addresses: Vec<_> = html.match_indices("http").map(|(i, _)| &html[i..i + 26]).collect();
        assert!(addresses.iter().all(|a| *a == "http://www.w3.org/2000/svg"), "{addresses:?}");
    }
}
