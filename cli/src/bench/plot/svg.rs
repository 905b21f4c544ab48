//! A drawing, element by element.

use std::fmt::{Display, Write};

/// An SVG image in the making. Coordinates are pixels, from the upper left.
pub(super) struct Svg {
    text: String,
}

#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

impl Svg {
    /// An image with a light ground of its own, so that it reads the same on light and dark pages.
    pub(super) fn new(width: f64, height: f64, ground: &str) -> Svg {
        let mut svg = Svg { text: String::new() };
        svg.add(format_args!(r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}""#));
        svg.add(format_args!(
            r#"  viewBox="0 0 {width} {height}" font-family="system-ui, 'DejaVu Sans', sans-serif">"#
        ));
        svg.add(format_args!(r#"<rect width="{width}" height="{height}" rx="6" fill="{ground}"/>"#));
        svg
    }

    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let ends = format!(r#"x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}""#);
        self.add(format_args!(r#"<line {ends} stroke="{colour}" stroke-width="{width}"/>"#));
    }

    /// A line through points, dashed as `dash` says in SVG's terms; solid where it is empty.
    pub(super) fn curve(&mut self, points: &[(f64, f64)], colour: &str, dash: &str) {
        let points: String = points.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect();
        let dash = if dash.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dash}""#) };
        self.add(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"#,
            points.trim_end()
        ));
    }

    /// A dot that says what it stands for when pointed at.
    pub(super) fn dot(&mut self, (x, y): (f64, f64), colour: &str, tip: &str) {
        let tip = escaped(tip);
        self.add(format_args!(
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"><title>{tip}</title></circle>"#
        ));
    }

    pub(super) fn text(&mut self, (x, y): (f64, f64), size: f64, colour: &str, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let place = format!(r#"x="{x:.1}" y="{y:.1}" text-anchor="{anchor}""#);
        let text = escaped(text);
        self.add(format_args!(r#"<text {place} font-size="{size}" fill="{colour}">{text}</text>"#));
    }

    pub(super) fn finish(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }

    fn add(&mut self, element: impl Display) {
        // Writing to a string can't fail.
        let _ = writeln!(self.text, "{element}");
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let mut svg = Svg::new(10.0, 10.0, "#fff");
        svg.text((1.0, 2.0), 3.0, "#000", Anchor::End, "a < b & c > d");
        svg.dot((1.0, 2.0), "#000", "<&>");
        let svg = svg.finish();
        assert!(
            svg.contains("a &lt; b &amp; c &gt; d</text>") && svg.contains("<title>&lt;&amp;&gt;</title>")
        );
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }
}
