//! A drawing in SVG, element by element.

use std::fmt::{Display, Write};

/// Widths of letters are guessed at this share of the size: wider than most fonts', so that what fits by it fits.
const LETTER: f64 = 0.62;

/// An SVG image in the making. Coordinates are pixels, from the upper left.
#[derive(Debug, Default)]
pub struct Svg {
    body: String,
    defs: String,
}

/// Which end of a text its place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    /// The text begins there.
    Start,
    /// The text is centred there.
    Middle,
    /// The text ends there.
    End,
}

/// A rectangle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rect {
    /// Its left side.
    pub x: f64,
    /// Its upper side.
    pub y: f64,
    /// Its width.
    pub width: f64,
    /// Its height.
    pub height: f64,
}

impl Svg {
    /// An image without anything in it.
    pub fn new() -> Svg {
        Svg::default()
    }

    /// A filled rectangle whose corners are rounded by `radius`.
    pub fn rect(&mut self, rect: Rect, radius: f64, fill: &str) {
        self.add(format_args!("<rect {}/>", attributes(rect, radius, fill)));
    }

    /// A filled rectangle that says what it stands for when pointed at.
    pub fn rect_with_tip(&mut self, rect: Rect, radius: f64, fill: &str, tip: &str) {
        let attributes = attributes(rect, radius, fill);
        self.add(format_args!("<rect {attributes}><title>{}</title></rect>", escaped(tip)));
    }

    /// Defines a fill of diagonal stripes, to be used as `url(#id)`.
    pub fn stripes(&mut self, id: &str, ground: &str, stripe: &str) {
        let pattern = format_args!(
            r#"<pattern id="{id}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect width="5" height="5" fill="{ground}"/><rect width="2" height="5" fill="{stripe}"/></pattern>"#
        );
        // Writing to a string can't fail.
        let _ = writeln!(self.defs, "{pattern}");
    }

    /// A straight line.
    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, width: f64) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let ends = format!(r#"x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}""#);
        self.add(format_args!(r#"<line {ends} stroke="{colour}" stroke-width="{width}"/>"#));
    }

    /// A line through points, dashed as `dash` says in SVG's terms; solid where it is empty.
    pub fn curve(&mut self, points: &[(f64, f64)], colour: &str, dash: &str) {
        let points: String = points.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect();
        let dash = if dash.is_empty() { String::new() } else { format!(r#" stroke-dasharray="{dash}""#) };
        self.add(format_args!(
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>"#,
            points.trim_end()
        ));
    }

    /// A dot that says what it stands for when pointed at.
    pub fn dot(&mut self, (x, y): (f64, f64), colour: &str, tip: &str) {
        let tip = escaped(tip);
        self.add(format_args!(
            r#"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="{colour}"><title>{tip}</title></circle>"#
        ));
    }

    /// A line of text, on its base line.
    pub fn text(&mut self, (x, y): (f64, f64), size: f64, colour: &str, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let place = format!(r#"x="{x:.1}" y="{y:.1}" text-anchor="{anchor}""#);
        let text = escaped(text);
        self.add(format_args!(r#"<text {place} font-size="{size}" fill="{colour}">{text}</text>"#));
    }

    /// The image, on a light ground of its own, so that it reads the same on light and dark pages.
    pub fn finish(self, width: f64, height: f64, ground: &str) -> String {
        let defs =
            if self.defs.is_empty() { String::new() } else { format!("<defs>\n{}</defs>\n", self.defs) };
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\"\n  \
             viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, 'DejaVu Sans', sans-serif\">\n\
             {defs}<rect width=\"{width}\" height=\"{height}\" rx=\"6\" fill=\"{ground}\"/>\n{}</svg>\n",
            self.body
        )
    }

    fn add(&mut self, element: impl Display) {
        // Writing to a string can't fail.
        let _ = writeln!(self.body, "{element}");
    }
}

/// About how wide a line of text is, rather too much than too little.
pub fn text_width(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * LETTER
}

/// Text as it is written in SVG, HTML and XML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn attributes(Rect { x, y, width, height }: Rect, radius: f64, fill: &str) -> String {
    let place = format!(r#"x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}""#);
    let round = if radius > 0.0 { format!(r#" rx="{radius}""#) } else { String::new() };
    format!(r#"{place}{round} fill="{fill}""#)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        let mut svg = Svg::new();
        svg.text((1.0, 2.0), 3.0, "#000", Anchor::End, "a < b & c > d");
        svg.dot((1.0, 2.0), "#000", "<&>");
        svg.rect_with_tip(Rect { x: 0.0, y: 0.0, width: 1.0, height: 1.0 }, 0.0, "#000", "\"");
        let svg = svg.finish(10.0, 10.0, "#fff");
        assert!(
            svg.contains("a &lt; b &amp; c &gt; d</text>") && svg.contains("<title>&lt;&amp;&gt;</title>")
        );
        assert!(svg.contains("<title>&quot;</title>"));
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    }
}
