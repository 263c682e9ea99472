import{d as e,r as o}from"./index-DbVWwu_m.js";var t=o("<h1>Server</h1>");function h(r){var a=t();e(r,a)}export{h as default};
