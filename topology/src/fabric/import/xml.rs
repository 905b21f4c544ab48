//! An XML file as a tree of elements, of which none is deeper, larger or more than a machine's topology needs.

use std::fmt::Write;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// Far above what a machine's topology takes.
const MAX_BYTES: usize = 32 << 20;
const MAX_ELEMENTS: usize = 1 << 18;
const MAX_DEPTH: usize = 64;
const MAX_ATTRIBUTES: usize = 64;

/// An element.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Element {
    pub(super) name: String,
    pub(super) attributes: Vec<(String, String)>,
    pub(super) children: Vec<Element>,
    /// What is written in it, outside of its children.
    pub(super) text: String,
}

impl Element {
    pub(super) fn new(name: &str) -> Element {
        Element { name: name.to_owned(), ..Element::default() }
    }

    /// Adds an attribute.
    pub(super) fn with(mut self, name: &str, value: impl ToString) -> Element {
        self.attributes.push((name.to_owned(), value.to_string()));
        self
    }

    /// The value of an attribute.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|(known, _)| known == name).map(|(_, value)| &**value)
    }

    /// The value of an attribute that is a number.
    pub(super) fn number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.get(name)?.trim().parse().ok()
    }

    /// The value of an attribute that is a number in hexadecimal, with or without `0x`.
    pub(super) fn hex(&self, name: &str) -> Option<u32> {
        let text = self.get(name)?.trim();
        u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
    }

    /// The children of this name.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Writes the element and what is in it, indented by two.
    pub(super) fn write(&self, out: &mut String, depth: usize) {
        let indent = 2 * depth;
        // Writing to a string can't fail.
        let _ = write!(out, "{:indent$}<{}", "", self.name);
        for (name, value) in &self.attributes {
            let _ = write!(out, " {name}=\"{}\"", quick_xml::escape::escape(value));
        }
        if self.children.is_empty() {
            out.push_str("/>\n");
            return;
        }
        out.push_str(">\n");
        self.children.iter().for_each(|child| child.write(out, depth + 1));
        let _ = writeln!(out, "{:indent$}</{}>", "", self.name);
    }
}

/// The outermost element of a text, or what is wrong with it.
pub(super) fn parse(text: &str) -> Result<Element, String> {
    if text.len() > MAX_BYTES {
        return Err(format!("it has {} bytes, more than {MAX_BYTES}", text.len()));
    }
    let mut reader = Reader::from_str(text);
    let mut open: Vec<Element> = Vec::new();
    let mut count = 0;
    loop {
        let at = reader.buffer_position();
        let wrong = |why: String| format!("it is no XML, at byte {at}: {why}");
        let event = reader.read_event().map_err(|e| wrong(e.to_string()))?;
        let done = match event {
            Event::Start(start) => {
                count += 1;
                if open.len() == MAX_DEPTH || count > MAX_ELEMENTS {
                    return Err(wrong(format!(
                        "more than {MAX_ELEMENTS} elements, or {MAX_DEPTH} within each other"
                    )));
                }
                open.push(element(&start).map_err(wrong)?);
                continue;
            }
            Event::Empty(start) => {
                count += 1;
                if count > MAX_ELEMENTS {
                    return Err(wrong(format!("more than {MAX_ELEMENTS} elements")));
                }
                element(&start).map_err(wrong)?
            }
            // The reader checks that it is the last one opened.
            Event::End(_) => match open.pop() {
                Some(element) => element,
                None => return Err(wrong("an element ends that didn't begin".to_owned())),
            },
            Event::Text(inside) => {
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&inside);
                }
                continue;
            }
            Event::Eof => return Err(wrong("it ends early".to_owned())),
            _ => continue,
        };
        match open.last_mut() {
            Some(parent) => parent.children.push(done),
            None => return Ok(done),
        }
    }
}

fn element(start: &BytesStart<'_>) -> Result<Element, String> {
    let mut element = Element::new(start.name().as_ref());
    // Its own check for names that repeat compares each with each.
    for attribute in start.attributes().with_checks(false) {
        let attribute = attribute.map_err(|e| e.to_string())?;
        if element.attributes.len() == MAX_ATTRIBUTES {
            return Err(format!("an element has more than {MAX_ATTRIBUTES} attributes"));
        }
        let value = quick_xml::escape::unescape(&attribute.value).map_err(|e| e.to_string())?;
        element.attributes.push((attribute.key.as_ref().to_owned(), value.into_owned()));
    }
    Ok(element)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn elements_attributes_and_text() {
        let text = "<?xml version=\"1.0\"?><!DOCTYPE a SYSTEM \"a.dtd\"><!-- c -->
            <a x='1 &amp; 2' y=\"0x1F\"><b/>text<c z=\"\"><d/></c></a>";
        let a = parse(text).unwrap();
        assert_eq!(
            (a.get("x"), a.hex("y"), a.number::<u32>("x"), &*a.text),
            (Some("1 & 2"), Some(31), None, "text")
        );
        assert_eq!(a.children.iter().map(|c| &*c.name).collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(a.all("c").next().unwrap().children[0].name, "d");
    }

    #[test]
    fn what_is_no_tree_or_too_large_is_refused() {
        let many = "<b/>".repeat(MAX_ELEMENTS);
        let attributes: String = (0..100).map(|i| format!(" a{i}=''")).collect();
        for (text, why) in [
            ("", "ends early"),
            ("text", "ends early"),
            ("<a>", "ends early"),
            ("<a></b>", "no XML"),
            ("</a>", "no XML"),
            ("<a x=1/>", "no XML"),
            ("<a x='&unknown;'/>", "no XML"),
            ("<a x='&#x110000;'/>", "no XML"),
            (&format!("{}{}", "<a>".repeat(65), "</a>".repeat(65)), "64 within each other"),
            (&format!("<a>{many}</a>"), "more than 262144 elements"),
            (&format!("<a{attributes}/>"), "more than 64 attributes"),
            (&" ".repeat(MAX_BYTES + 1), "more than 33554432"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(refused.contains(why), "{why}: {refused}");
        }
        // Entities of one's own, which could be made of each other, aren't known.
        let bomb = "<!DOCTYPE a [<!ENTITY x 'xx'><!ENTITY y '&x;&x;'>]><a z='&y;'/>";
        assert!(parse(bomb).is_err());
    }

    fn any_element() -> impl Strategy<Value = Element> {
        let leaf = ("[a-z]{1,4}", proptest::collection::vec(("[a-z]{1,4}", "[ -~]{0,8}"), 0..4))
            .prop_map(|(name, attributes)| Element { name, attributes, ..Element::default() });
        leaf.prop_recursive(4, 30, 4, |inner| {
            ("[a-z]{1,4}", proptest::collection::vec(inner, 0..4)).prop_map(|(name, children)| Element {
                name,
                children,
                ..Element::default()
            })
        })
    }

    proptest! {
        #[test]
        fn an_element_is_read_as_it_was_written(element in any_element()) {
            let mut text = String::new();
            element.write(&mut text, 0);
            let mut read = parse(&text).unwrap();
            fn without_text(element: &mut Element) {
                element.text.clear();
                element.children.iter_mut().for_each(without_text);
            }
            without_text(&mut read);
            prop_assert_eq!(read, element);
        }

        #[test]
        fn no_text_is_a_panic(text in "[<>/a-c=\"'&;!\\[ -]{0,100}") {
            let _ = parse(&text);
        }
    }
}
